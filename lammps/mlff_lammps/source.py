"""The source of LAMMPS: a folder or archive of the user's choice, or Debian's source package where apt is there.

apt itself downloads it, from the mirror that this machine uses already, into a private root that leaves the system's
own lists alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlff_engines.errors import ConfigError
from mlff_engines.files import sha256_of

# What is changed in the source: file -> pattern and replacement, where it applies
EDITS: dict[str, list[tuple[str, str]]] = {
    # one integer for every atom x pair, terabytes from 10,000 atoms on, for the ACE descriptor, which is not built here
    "src/ML-IAP/mliap_data.cpp": [(r"^.*(memory->grow\(lmp_firstneigh,|lmp_firstneigh\[ii\]).*\n", "")],
    # too few elements were read from beyond the end of the command
    "src/ML-IAP/pair_mliap.cpp": [
        (
            r'if \(narg < 3\) error->all\(FLERR, ?"Incorrect args for pair coefficients"\);',
            "if (narg != 2 + atom->ntypes) error->all(FLERR, "
            '"pair_coeff names {} elements for {} atom types: give one for each", narg - 2, atom->ntypes);',
        ),
        (
            r'else error->all\(FLERR, ?"Incorrect args for pair coefficients"\);',
            'else error->all(FLERR, "pair_coeff gives type {} the element {}, unknown to the model", i, elemname);',
        ),
        (
            r'if \(count == 0\) error->all\(FLERR, ?"Incorrect args for pair coefficients"\);',
            'if (count == 0 || (count < n * (n + 1) / 2 && !utils::strmatch(force->pair_style, "^hybrid"))) '
            'error->all(FLERR, "pair_coeff maps a type to NULL: give each an element");',
        ),
    ],
}
SUITE = "trixie"  # of Debian: the first whose LAMMPS has `mliap unified`
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
Echo = Callable[[str], None]


def origin_of(source: Path | None) -> str:
    """What tells one source from another.

    Raises:
        ConfigError: a folder without LAMMPS' source.
    """
    if source is None:
        return f"debian {SUITE}"
    if source.is_file():
        return f"sha256 {sha256_of(source)}"
    if not (source / "cmake" / "CMakeLists.txt").is_file() or not (source / "src" / "version.h").is_file():
        raise ConfigError(f"{source} is neither an archive nor a folder of LAMMPS' source (no cmake/CMakeLists.txt)")
    stamps = [(path.name, path.stat().st_mtime_ns) for path in sorted((source / "src").iterdir())]
    return f"{source.resolve()} {hashlib.sha256(json.dumps(stamps).encode()).hexdigest()}"


def unpacked(source: Path | None, work: Path, echo: Echo) -> Path:
    """The folder of the source: unpacked or copied, with the changes of `EDITS`.

    Raises:
        ConfigError: it cannot be had, or is no source of LAMMPS.
    """
    tree, partial = work / "source", work / "source.partial"
    if tree.is_dir():
        return tree
    shutil.rmtree(partial, ignore_errors=True)
    if source is not None and source.is_dir():
        for part in ("cmake", "lib", "potentials", "python", "src", "LICENSE"):
            if (source / part).is_dir():
                shutil.copytree(source / part, partial / source.name / part, symlinks=True)
            elif (source / part).is_file():
                shutil.copy2(source / part, partial / source.name)
    else:
        archive = source or _debian_archive(work, echo)
        echo(f"unpacking {archive.name}")
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(partial, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ConfigError(
                f"cannot unpack {archive}: {error}. Give an archive of LAMMPS' source, *.tar.gz"
            ) from None
    found = sorted(partial.glob("*/cmake/CMakeLists.txt"))
    if not found:
        raise ConfigError(f"{source} is no archive of LAMMPS' source: it has no folder with cmake/CMakeLists.txt")
    made = found[0].parent.parent
    for name, edits in EDITS.items():
        if (made / name).is_file():
            text = (made / name).read_text()
            for pattern, replacement in edits:
                text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
            (made / name).write_text(text)
    made.replace(tree)
    return tree


def _debian_archive(work: Path, echo: Echo) -> Path:
    """Debian's unchanged upstream source, fetched and checked by apt."""
    if shutil.which("apt-get") is None:
        raise ConfigError(
            "no apt-get to fetch LAMMPS with: download a release from lammps.org and give it with --source ARCHIVE"
        )
    targets = output_of(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], "ask apt")
    mirrors = [uri for uri in targets.split() if uri.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise ConfigError(
            "apt here has no Debian mirror: download a release from lammps.org and give it with --source ARCHIVE"
        )
    root = work / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    signed = f"Signed-By: {KEYRING}\n" if KEYRING.is_file() else ""
    (root / "list.sources").write_text(
        f"Types: deb-src\nURIs: {mirrors[0]}\nSuites: {SUITE}\nComponents: main\n{signed}"
    )
    options = {
        "Dir::Etc::SourceList": root / "list.sources",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": root / "lists",
        "Dir::State::status": root / "status",
        "Dir::Cache": root,
        "APT::Sandbox::User": "",
    }
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    echo(f"fetching the source of LAMMPS from Debian {SUITE} (130 MB)")
    apt = [
        subprocess.run([*command[:1], *settings, *command[1:]], capture_output=True, text=True)
        for command in (["apt-get", "update"], ["apt-cache", "showsrc", "lammps"])
    ]
    match = re.search(r"^ ([0-9a-f]{64}) \d+ (lammps_\S+\.orig\.tar\.\w+)$", apt[1].stdout, re.MULTILINE)
    if match is None:
        lines = "\n".join("".join(done.stderr for done in apt).strip().splitlines()[-10:])
        raise ConfigError(
            f"apt finds no source of LAMMPS in Debian {SUITE} at {mirrors[0]}: is that within reach? Or download a "
            f"release from lammps.org elsewhere and give it with --source ARCHIVE. apt said:\n{lines}"
        )
    archive = root / match[2]
    if not archive.is_file() or sha256_of(archive) != match[1]:
        # its description may be missing on a mirror while the archive is there: the archive is what counts
        said = subprocess.run(
            ["apt-get", *settings, "source", "--download-only", "lammps"], cwd=root, capture_output=True, text=True
        )
        if not archive.is_file() or sha256_of(archive) != match[1]:
            raise ConfigError(f"apt did not bring {archive.name}; try again or use --source ARCHIVE:\n{said.stderr}")
    return archive


def output_of(command: Sequence[str], doing: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        ConfigError: it cannot be run or fails; says that this was to do `doing`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise ConfigError(f"cannot {doing}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ConfigError(f"cannot {doing}: {command[0]} ended with {done.returncode}:\n{last}")
    return done.stdout
