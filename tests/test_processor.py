"""A library that was built for another processor."""

import platform
from pathlib import Path

import pytest

from pockettune.common.errors import UserError
from pockettune.runtimes import processor


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the check is of x86 processors")
def test_a_processor_that_llama_cpp_was_not_built_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    cpuinfo.write_text("model name\t: of 2008\nflags\t\t: fpu sse4_2\n")
    with pytest.raises(UserError, match=r"avx2.*this one.*has not.*GGML_NATIVE=OFF"):
        processor.check_processor()
    cpuinfo.write_text(f"flags\t\t: {' '.join(processor.INSTRUCTIONS.values())}\n")
    processor.check_processor()
    cpuinfo.unlink()  # another system: nothing is known, nothing is refused
    processor.check_processor()
