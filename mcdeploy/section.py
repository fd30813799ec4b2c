"""What the sections of a recipe are made of: small frozen models, each handed whole to the function that works."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class RuleConfig(Section):
    """The options of a connectivity rule. A subclass narrows ``rule`` to its own name and adds its keys."""

    rule: str

    def has_joint_phase(self) -> bool:
        """Whether gates are learned beside the weights for some epochs and then frozen."""
        return False


class GatedConfig(RuleConfig):
    """A rule with gates that learn in a joint phase; what the loop needs to know of it."""

    gate_lr: Positive = 0.02
    gate_grad: Literal["raw", "normalised"] = "normalised"

    def has_joint_phase(self) -> bool:
        return True
