"""Which names of a student stand for which names of its teacher."""

from __future__ import annotations

from collections.abc import Mapping

from raydistill.models.projection.structure import Structure


class Match:
    """Canonical names and spaces of a student as its teacher has them.

    `moved` are the paths that stand elsewhere in the teacher, e.g. `blocks.1` for `blocks.3`; of several that a name
    begins with, the longest counts.
    """

    def __init__(self, teacher: Structure, student: Structure, moved: Mapping[str, str]):
        self._teacher, self._moved = teacher, dict(moved)
        self._members: dict[str, list[str]] = {}
        for alias, space in student.aliases.items():
            self._members.setdefault(space, []).append(alias)

    def name(self, name: str) -> str:
        """The teacher's canonical name."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            path = ".".join(parts[:length])
            if path in self._moved:
                return ".".join([self._moved[path], *parts[length:]])
        return name

    def space(self, space: str) -> str:
        """The teacher's space; of a space that stands for several that are tied, the first of theirs."""
        places = [self.name(member) for member in self._members.get(space, [space])]
        found = [self._teacher.aliases.get(place, place) for place in places]
        return next((name for name in found if name in self._teacher.sizes), found[0])
