"""DAS (Dynamic Architecture Skipping, NeurIPS 2023): its configuration. Where the adapters go is each model family's
business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from fastpetl.skip.plan import check_shortcut

# Names of the parameters that are trained: the paper's rule, which holds for Hugging Face's names as well.
TRAINABLE = ("classifier", "pooler", "token_type_embeddings", "rank_output", "adapter")
FROZEN = ("text_transformer", "vit_model")  # METER's towers: none of their poolers and embeddings
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class DASConfig:
    """Semantics: two parallel adapters in each block, x + f(x) + A(x), and one shortcut adapter per block, x +
    A_skip(x).

    bottleneck, skip_bottleneck: None is the paper's for the model family found (ViLT: 96 and 192). reduction_factor:
    instead of bottleneck, bottleneck = hidden // reduction_factor. shortcut: what skipped blocks give, "adapter", or
    "identity": then no shortcut adapters are made. classifier_token: METER's first text
    token is a trained one (the original's code does so, the paper does not say so); None is what the original does:
    True for METER, False for ViLT, which has no such thing. Trained are the adapters, pooler, classifier, token type
    embeddings and rank_output.
    """

    bottleneck: int | None = None
    skip_bottleneck: int | None = None
    reduction_factor: int | None = None
    activation: str = "relu"
    scale: float = 1.0
    shortcut: str = "adapter"
    classifier_token: bool | None = None

    def __post_init__(self):
        for name in ("bottleneck", "skip_bottleneck", "reduction_factor"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"DASConfig: {name} is {value!r}, expected an integer >= 1 or None")
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError("DASConfig: bottleneck and reduction_factor are both given, expected one of them")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"DASConfig: activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if not isinstance(self.scale, (int, float)) or isinstance(self.scale, bool):
            raise ValueError(f"DASConfig: scale is {self.scale!r}, expected a number")
        if self.classifier_token not in (None, True, False):
            raise ValueError(f"DASConfig: classifier_token is {self.classifier_token!r}, expected True, False or None")
        if self.shortcut is None:
            raise ValueError("DASConfig: shortcut is None, expected one of adapter, identity")
        check_shortcut(self.shortcut, "DASConfig")

    method = attaches = "das"

    def resolved(self, family, host) -> DASConfig:
        """Semantics: this configuration with every size a number, the family's where none is given."""
        hidden, (bottleneck, skip_bottleneck) = family.hidden(host), family.das_sizes
        if self.reduction_factor is not None:
            bottleneck = hidden // self.reduction_factor
            if bottleneck < 1:
                raise ValueError(
                    f"DASConfig: reduction_factor is {self.reduction_factor}, expected at most the hidden size {hidden}"
                )
        return replace(
            self,
            bottleneck=self.bottleneck or bottleneck,
            skip_bottleneck=self.skip_bottleneck or skip_bottleneck,
            reduction_factor=None,
            classifier_token=self._classifier_token(family),
        )

    def _classifier_token(self, family) -> bool:
        if self.classifier_token and not family.classifier_token:
            raise ValueError(f"DASConfig: classifier_token is True, expected None or False for {family.name}")
        return family.classifier_token if self.classifier_token is None else self.classifier_token

    @property
    def parts(self) -> tuple[DASConfig]:
        """Semantics: the configurations to attach: this one."""
        return (self,)

    def place(self, family, model, host):
        """Semantics: the module that the family attaches this to."""
        return host

    def added(self, model, host, family) -> None:
        """Semantics: what is added beside what the family attaches: nothing."""

    def removed(self, model, host) -> None:
        """Semantics: undoes `added`."""

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def trainable(name: str) -> bool:
        """Semantics: does DAS train the parameter of this name?"""
        return any(part in name for part in TRAINABLE) and not any(part in name for part in FROZEN)
