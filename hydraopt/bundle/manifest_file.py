"""``manifest.json``: read, and refused unless it is what hydraopt writes and holds together."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from hydraopt.bundle.layout import FAMILIES, MANIFEST_FILE, SCHEMA, Manifest, ModuleEntry
from hydraopt.errors import BundleError, HydraoptError
from hydraopt.json_text import parse_object
from hydraopt.names import check_task_name
from hydraopt.own_files import own_file
from hydraopt.precision import PRECISIONS

_MAX_MANIFEST_BYTES = 16_000_000  # thousands of tasks; a hundred megabytes would take many gigabytes to check


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` alone.

    Raises:
        BundleError: If it is missing, not canonical, contradicts itself, or was written by a newer version.
    """
    file = own_file(path, MANIFEST_FILE, BundleError)
    if not file.is_file():
        raise BundleError(f"{path}: not a bundle: {MANIFEST_FILE} is missing")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: {file.stat().st_size} bytes is no manifest")
    return parse_manifest(file.read_bytes(), str(file))


def find_manifest(path: Path) -> Manifest | None:
    """The manifest of a bundle; None where there is none of ours."""
    try:
        return read_manifest(path)
    except (BundleError, OSError):
        return None


def check_outside(path: Path) -> None:
    """Refuse a place within a bundle.

    Raises:
        BundleError: Naming the bundle.
    """
    for parent in path.absolute().parents:
        if find_manifest(parent) is not None:
            raise BundleError(
                f"{path} lies in the bundle {parent}, which holds nothing but itself; choose another place"
            )


def stray_files(path: Path, manifest: Manifest) -> list[str]:
    """Files in a bundle's folder that its manifest does not list, sorted."""
    known = {MANIFEST_FILE, *manifest.files()}
    found = {
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_symlink() or not file.is_dir()
    }
    return sorted(found - known)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes; ``where`` is named in errors.

    Raises:
        BundleError: As for :func:`read_manifest`.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as reason:
        _check_schema(_claimed_schema(data), where)
        first = reason.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{where}: not a manifest this version can read: {place}: {first['msg']}"
        ) from reason
    _check_schema(manifest.schema_version, where)
    for task in manifest.tasks:
        _checked_name(task, where)
    if manifest.canonical() != data:
        raise BundleError(
            f"{where}: the bytes are not the canonical form hydraopt writes; the file was changed"
        )
    if unknown := sorted(set(manifest.precisions) - set(PRECISIONS)):
        raise BundleError(f"{where}: precision of {unknown[0]} bits is not known. Update hydraopt.")
    for module in manifest.modules:
        _check_module(where, module, manifest)
    return manifest


def _claimed_schema(data: bytes) -> int:
    """The schema a manifest says it has, though its fields do not fit this version's; ours if it says none."""
    try:
        version = parse_object(data, "", BundleError).get("schema_version")
    except BundleError:
        return SCHEMA
    return version if isinstance(version, int) else SCHEMA


def _check_schema(version: int, where: str) -> None:
    if version != SCHEMA:
        way_out = "Update hydraopt." if version > SCHEMA else "It was made by an older version: merge again."
        raise BundleError(f"{where}: schema {version}; this version reads {SCHEMA}. {way_out}")


def _checked_name(task: str, where: str) -> None:
    try:
        check_task_name(task)
    except HydraoptError as reason:
        raise BundleError(f"{where}: {reason}") from reason


def _check_module(where: str, module: ModuleEntry, manifest: Manifest) -> None:
    if module.family not in FAMILIES:
        raise BundleError(
            f"{where}: module {module.name!r} has the unknown family {module.family!r}. Update hydraopt."
        )
    tasks, parts = len(manifest.tasks), {"separate": 0, "two-sided": 2}.get(module.family, 1)
    counts = [*module.shared, *(one for one in module.heads if one is not None)]
    sound = (
        len(module.heads) == tasks
        and len(module.shared) == parts
        and len(module.groups) in {0, tasks}
        and min(module.shape) >= 1
        and all(len(one) <= len(manifest.precisions) and min(one, default=0) >= 0 for one in counts)
        and (module.family == "dense-heads" or not module.groups)
        and all(-1 <= group < tasks for group in module.groups)
        and {group for group in module.groups if group >= 0} == set(range(max(module.groups, default=-1) + 1))
    )
    if not sound:
        raise BundleError(
            f"{where}: module {module.name!r} has shape {module.shape}, shared counts {module.shared}, head counts "
            f"{module.heads} and groups {module.groups}, which do not fit {module.family!r} with {tasks} tasks"
        )
