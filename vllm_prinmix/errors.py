"""The one exception that users see: what is wrong, where, found, expected, and what to do."""


class PrinMixError(Exception):
    """An error in the user's input or environment, in words that lead to its cure.

    ``what`` is one sentence. ``where`` names the file, folder, tensor or option. ``found`` and
    ``expected`` stand side by side where a comparison failed. ``fix`` says what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.fix = what, where, found, expected, fix
        super().__init__(self._text())

    def __reduce__(self):
        # Errors cross process boundaries (worker to API server), and pickle would call __init__
        # with the formatted text as `what`.
        fields = {"where": self.where, "found": self.found, "expected": self.expected, "fix": self.fix}
        return (_rebuild, (type(self), self.what, fields))

    def _text(self) -> str:
        parts = [self.what if self.where is None else f"{self.what} [{self.where}]"]
        if self.found is not None:
            parts.append(f"found: {self.found}")
        if self.expected is not None:
            parts.append(f"expected: {self.expected}")
        if self.fix:
            parts.append(f"to fix: {self.fix}")
        return "; ".join(parts)


def _rebuild(cls: type[PrinMixError], what: str, fields: dict) -> PrinMixError:
    return cls(what, **fields)
