"""The ways to keep less of what autograd saves in a block that is not run again."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_engine.activation.blocks import KEEP, SELECTIVE
from mlsys_engine.errors import ConfigError, did_you_mean

LOSSY_FORMS = ("bf16", "fp8", "int8")
OFFLOAD = "offload"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What becomes of the tensors that autograd saves in a block. Masks are packed to bits in any case."""

    drops_cheap: bool = False
    """Outputs of cheap operations are not kept, but computed again from what their nodes save."""
    form: str | None = None
    """What is kept is packed in this lossy form; "offload" moves it out of the device's memory."""

    @property
    def is_lossy(self) -> bool:
        return self.form in LOSSY_FORMS


OPTIONS = {
    SELECTIVE: Option(drops_cheap=True),
    **{form: Option(form=form) for form in (*LOSSY_FORMS, OFFLOAD)},
    **{f"{SELECTIVE}-{form}": Option(drops_cheap=True, form=form) for form in (*LOSSY_FORMS, OFFLOAD)},
}

BASE_OF_OFFLOADING = {OFFLOAD: KEEP, f"{SELECTIVE}-{OFFLOAD}": SELECTIVE}  # that keeps what is moved away


def candidates(*, lossy: str | None = None, offload: bool = False) -> tuple[str, ...]:
    """The options that a budget may choose from for a block; raises ConfigError for an unknown lossy form."""
    if lossy is not None and lossy not in LOSSY_FORMS:
        raise ConfigError(
            f"lossy={lossy!r} was given to activation checkpointing.",
            f"Lossy forms: {', '.join(LOSSY_FORMS)}; None keeps every bit.",
            did_you_mean(str(lossy), LOSSY_FORMS),
        )
    forms = [form for form in (lossy, OFFLOAD if offload else None) if form is not None]
    return (KEEP, SELECTIVE, *(name for form in forms for name in (form, f"{SELECTIVE}-{form}")))
