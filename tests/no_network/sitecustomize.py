"""Ends whatever leaves this machine: Python reads this at its start when the folder is on PYTHONPATH.

NO_NETWORK_LOG is a file that gets a line for each address; a library that catches the exception is
so found out too. With NO_NETWORK=loopback addresses of this machine are allowed, else none is.
"""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Any


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which also sees what is called from C."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if os.environ.get("NO_NETWORK") == "loopback" and is_loopback(host):
        return
    with Path(os.environ["NO_NETWORK_LOG"]).open("a") as log:
        log.write(f"{event} {host}\n")
    raise PermissionError(f"no network: {event} {host}")


def is_loopback(host: object) -> bool:
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return text == "localhost"


if "NO_NETWORK_LOG" in os.environ:
    sys.addaudithook(refuse)
