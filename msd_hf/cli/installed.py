"""What is installed: the packages that msd-hf needs, and those of its extras, by its own metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement


DISTRIBUTION = "msd-hf"
# Extras for working on the package itself.
_FOR_DEVELOPERS = ("dev", "docs", "examples", "studies", "test")


@dataclass(frozen=True)
class Package:
    """A package that is needed: its name, the versions that will do, and the version that is installed, if one is."""

    name: str
    specifier: str
    installed: str | None
    fits: bool

    def problem(self) -> str | None:
        """What is wrong with it, with the command that mends it; `None` if nothing is."""
        if self.fits:
            return None
        found = "is missing" if self.installed is None else f"{self.installed} is not {self.specifier}"
        return f'{self.name} {found}: pip install "{self.name}{self.specifier}"'


def required_packages() -> list[Package]:
    """
    The packages that every installation needs.

    Raises:
        PackageNotFoundError: when msd-hf was not installed but only found on the path, so that it has no metadata.
    """
    return [_look_up(requirement) for requirement in _requirements("")]


def extras() -> dict[str, list[Package]]:
    """The packages of each extra that users install. Raises what [`required_packages`] raises."""
    names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return {name: _of_extra(name) for name in sorted(names) if name not in _FOR_DEVELOPERS}


def _of_extra(extra: str) -> list[Package]:
    found: dict[str, Package] = {}
    waiting, seen = [extra], {extra}
    while waiting:
        for requirement in _requirements(waiting.pop()):
            if requirement.name == DISTRIBUTION:  # an extra that contains another
                waiting += sorted(requirement.extras - seen)
                seen |= requirement.extras
            else:
                found[requirement.name] = _look_up(requirement)
    return list(found.values())


def _requirements(extra: str) -> Iterator[Requirement]:
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if (marker is None and not extra) or (
            marker is not None
            and marker.evaluate({"extra": extra})
            and (not extra or not marker.evaluate({"extra": ""}))
        ):
            yield requirement


def _look_up(requirement: Requirement) -> Package:
    try:
        installed: str | None = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed = None
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), installed, fits)


__all__ = ["DISTRIBUTION", "Package", "extras", "required_packages"]
