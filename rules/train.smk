# The adapter, and the model it makes of the base.


if CHOOSE_LAYERS:

    rule measure_layers:
        input:
            **program("measure_layers"),
            **folder("base", FETCHED_MODEL),
            **folder("tokens", "<results>/tokens"),
        output:
            layers="<results>/layers.json",
        log:
            "<results>/logs/measure_layers.log",
        benchmark:
            "<results>/benchmarks/measure_layers.tsv"
        conda:
            "../envs/train.yaml"
        threads: 4
        resources:
            gpu_turn=GPU_TURN,
            mem_mb=memory(8000, "evaluate (PyTorch)"),
            runtime="4h",
        params:
            keep=KEEP_LAYERS["count"],
        shell:
            command("input.base input.tokens params.keep threads output=output.layers")


if KEEP_LAYERS:

    rule shrink_model:
        input:
            **program("shrink_model"),
            **folder("base", FETCHED_MODEL),
            layers="<results>/layers.json" if CHOOSE_LAYERS else [],
        output:
            base=directory(BASE_MODEL),
            manifest=f"{BASE_MODEL}.sha256",
        log:
            "<results>/logs/shrink_model.log",
        benchmark:
            "<results>/benchmarks/shrink_model.tsv"
        priority: 1
        conda:
            "../envs/train.yaml"
        resources:
            mem_mb=memory(8000),
            runtime="30m",
        params:
            keep=layers_to_keep,
        shell:
            command("input.base params.keep input.layers output=output.base")


# Before the hours: whether this model can go the whole way. Its program alone is an input and not its
# modules: training depends on it, and a line of the merge's or the converter's must not train anew.
rule check_base:
    input:
        **folder("base", BASE_MODEL),
        **folder("tokens", "<results>/tokens"),
        **folder("converter", CONVERTER),
        program="scripts/check_base.py",
    output:
        check="<results>/base_check.json",
    log:
        "<results>/logs/check_base.log",
    benchmark:
        "<results>/benchmarks/check_base.tsv"
    priority: 1
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(8000, "check_base"),
        runtime="30m",
    params:
        settings=adapter_shape,
    shell:
        command(
            "params.settings input.base input.tokens input.converter threads output=output.check"
        )


if TEACHER:

    # Once: neither its temperature, nor its weight, nor the layers that the student keeps ask the teacher
    # anew. So it waits for no check of the student; check_base goes before it where both could start.
    rule score_teacher:
        input:
            **program("score_teacher"),
            **folder("base", FETCHED_MODEL),
            **folder("tokens", "<results>/tokens"),
            teacher=deciding_files(TEACHER_MODEL),
            splits=expand(
                "<results>/dataset/{split}.jsonl",
                split=["train", "validation", "test"],
            ),
            texts=unlabelled_texts(),
        output:
            scores=directory("<results>/teacher"),
            manifest="<results>/teacher.sha256",
        log:
            "<results>/logs/score_teacher.log",
        benchmark:
            "<results>/benchmarks/score_teacher.tsv"
        conda:
            "../envs/llama_cpp.yaml"
        threads: 4
        resources:
            gpu_turn=GPU_TURN,
            # In fp32 beside the 16 bits that are stored.
            mem_mb=memory(4000 + 3 * weight_bytes(TEACHER_MODEL) // 10**6),
            runtime="4h",
        params:
            settings=settings("task", "tokenize", "dataset"),
            teacher=str(TEACHER_MODEL),
        shell:
            command(
                "params.settings input.base params.teacher input.tokens input.splits input.texts"
                " threads output=output.scores"
            )


if OWN_ADAPTER:

    rule import_adapter:
        input:
            **program("import_adapter"),
            **folder("base", BASE_MODEL),
            check="<results>/base_check.json",
            files=adapter_files(),
        output:
            adapter=directory("<results>/adapter"),
            manifest="<results>/adapter.sha256",
        log:
            "<results>/logs/import_adapter.log",
        benchmark:
            "<results>/benchmarks/import_adapter.tsv"
        conda:
            "../envs/data.yaml"
        params:
            adapter=OWN_ADAPTER,
        shell:
            command("params.adapter input.base output=output.adapter")

else:

    rule train:
        input:
            **program("train_adapter"),
            **folder("base", BASE_MODEL),
            **folder("tokens", "<results>/tokens"),
            **(folder("teacher", "<results>/teacher") if TEACHER else {"teacher": []}),
            check="<results>/base_check.json",
        output:
            adapter=directory("<results>/adapter"),
            manifest="<results>/adapter.sha256",
        log:
            "<results>/logs/train.log",
        benchmark:
            "<results>/benchmarks/train.tsv"
        conda:
            "../envs/train.yaml"
        threads: 4
        resources:
            gpu=1,
            gpu_turn=GPU_TURN,
            mem_mb=memory(16000, "train"),
            runtime="4h",
        params:
            settings=settings("train", "task", "dataset"),
        shell:
            command(
                "params.settings input.base input.tokens input.teacher threads"
                " output=output.adapter"
            )


rule merge:
    input:
        **program("merge_adapter"),
        **folder("base", BASE_MODEL),
        **folder("adapter", "<results>/adapter"),
    output:
        merged=directory("<results>/merged"),
        manifest="<results>/merged.sha256",
    log:
        "<results>/logs/merge.log",
    benchmark:
        "<results>/benchmarks/merge.tsv"
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=memory(8000, "merge"),
        runtime="30m",
    shell:
        command("input.base input.adapter output=output.merged")
