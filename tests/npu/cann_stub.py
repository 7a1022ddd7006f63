"""Stand-ins for the libraries of CANN, so that torch_npu can be imported where there is none: ``cann_stub.py FOLDER``.

Every function that torch_npu's libraries miss returns 0. That is enough for schemas, shape functions and the building
of graphs; nothing can be run with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

SOC = "Ascend910B1"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    package = _package("torch_npu")
    libraries = sorted(package.rglob("*.so"))
    present = [*libraries, *(_package("torch") / "lib").glob("*.so*"), *package.parent.glob("torch_npu.libs/*")]
    needed = {name for library in libraries for name in _needed(library)}
    missing = needed - {file.name for file in present} - _system_libraries()
    defined = set(_symbols(present, "--defined-only")) | set(_symbols(_files_of_system(needed), "--defined-only"))
    absent = set(_symbols(libraries, "--undefined-only")) - defined
    absent = {name for name in absent if not re.match(r"_?Py|_ITM_|__gmon|__cxa_finalize", name)}
    source = folder / "stub.c"
    source.write_text("\n".join(_definition(name) for name in sorted(absent)) + "\n")
    for library in sorted(missing):
        command = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", str(source), "-o", str(folder / library)]
        subprocess.run(command, check=True)
    print(f"{len(missing)} libraries with {len(absent)} symbols each: {', '.join(sorted(missing))}")


def _definition(name: str) -> str:
    if name == "aclrtGetSocName":
        return f'const char *{name}(void) {{ return "{SOC}"; }}'
    if name.startswith(("_ZTV", "_ZTI", "_ZTS", "_ZGV")):
        return f"char {name}[4096];"
    return f"long {name}(void) {{ return 0; }}"


def _package(name: str) -> Path:
    found = find_spec(name)  # imports nothing
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed for {sys.executable}")
    return Path(found.origin).parent


def _needed(library: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", str(library)))


def _system_libraries() -> set[str]:
    return {line.split()[0] for line in _run("ldconfig", "-p").splitlines()[1:] if line.strip()}


def _files_of_system(names: Iterable[str]) -> list[Path]:
    lines = (line.split() for line in _run("ldconfig", "-p").splitlines()[1:] if "=>" in line)
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    return [Path(line[-1]) for line in lines if line[0] in set(names) and machine in line[-1]]


def _symbols(libraries: Iterable[Path], which: str) -> list[str]:
    lines = (line for file in libraries for line in _run("nm", "-D", which, str(file)).splitlines())
    return [line.split()[-1].split("@")[0] for line in lines if line.strip() and not re.search(r"\b[wv] ", line)]


def _run(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
