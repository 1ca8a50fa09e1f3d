"""The bill of materials of a release, in CycloneDX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement


def make_sbom(wheel: Path, files: Sequence[Path]) -> str:
    """Describe a release: the package, its files with their hashes, and what it requires.

    Args:
        wheel: one of the release's, for the metadata.
        files: all of the release's.

    Returns:
        JSON, valid by the schema of CycloneDX 1.6.
    """
    about = metadata(wheel)
    name, version = about["Name"], about["Version"]
    package = Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=name,
        description=about["Summary"],
        licenses=[LicenseExpression(about["License-Expression"])],
        purl=PackageURL("pypi", name=name, version=version),
        components=[
            Component(
                name=path.name,
                type=ComponentType.FILE,
                bom_ref=path.name,
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256(path))],
            )
            for path in files
        ],
    )
    requirements = [Requirement(line) for line in about.get_all("Requires-Dist", [])]
    required = [
        Component(
            name=each.name,
            type=ComponentType.LIBRARY,
            bom_ref=each.name,
            version=str(each.specifier) or None,
            purl=PackageURL("pypi", name=each.name),
        )
        for each in requirements
        if each.marker is None or "extra" not in str(each.marker)
    ]
    bom = Bom(components=required)
    bom.metadata.component = package
    bom.register_dependency(package, required)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        raise RuntimeError(f"the SBOM must follow the schema of CycloneDX 1.6, got {fault}")
    return json.dumps(json.loads(text), indent=1) + "\n"


def checksums(files: Sequence[Path]) -> str:
    """Lines that ``sha256sum --check`` reads."""
    return "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(files))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata(wheel: Path) -> Message:
    """The METADATA of a wheel."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())
