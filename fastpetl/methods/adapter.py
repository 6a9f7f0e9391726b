"""VL-Adapter's sequential adapters (CVPR 2022): their configuration. Where they go is each model family's business."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fastpetl.methods.das import ACTIVATIONS

if TYPE_CHECKING:
    from fastpetl.methods.prompt import PromptConfig

SHARINGS = ("single", "half", "multiple")
IMAGE_TASKS = ("vqa", "gqa", "nlvr", "caption")


# The heads of task models, beside the backbone; and METER's towers.
HEADS = {"classifier", "classification_head", "qa_outputs", "rank_output"}
FROZEN = {"text_transformer", "vit_model"}


def is_norm(parts: list[str]) -> bool:
    """Semantics: is the parameter of this name, split at its dots, a norm's?"""
    return len(parts) > 1 and "norm" in parts[-2].lower()


@dataclass(frozen=True)
class AdapterConfig:
    """Semantics: each sublayer's output f becomes f + U(act(D(f))) before dropout and residual, per task.

    tasks: their names, the paper's image tasks by default. sharing: "single" adapters for all tasks, "multiple", one
    set per task, or "half": one per task with the `shared` ("up" or "down") projection in common. bottleneck: None is
    hidden // reduction_factor (the paper's 8). norm_before, norm_after: a LayerNorm inside the adapter, before the
    down and after the up projection. cross_attention: adapters after cross-attention too. Trained are the adapters
    and, by flags, the visual embedding and the backbone's norms; train_norms None is what the paper's numbers come
    from: True for BART, False for T5 (whose norms the original code meant to train and left frozen).
    train_head: a task head on the backbone (classifier, answers, ranks) trains too; METER's towers never do.
    prompts: a PromptConfig (or its fields), whose prompts stand in front of the text besides: of it `sharing`, `length`
    and `middle` have a meaning, the tasks are these. Every method but the baselines takes them.
    """

    tasks: tuple[str, ...] = IMAGE_TASKS
    sharing: str = "single"
    shared: str = "up"
    bottleneck: int | None = None
    reduction_factor: int | None = None
    activation: str = "gelu_tanh"
    norm_before: bool = False
    norm_after: bool = False
    cross_attention: bool = True
    train_norms: bool | None = None
    train_visual: bool = True
    train_head: bool = True
    prompts: PromptConfig | None = None

    method = "adapter"
    attaches = "adapter"  # how a family puts it on: attach_adapter

    def __post_init__(self):
        if isinstance(self.tasks, str) or not all(isinstance(task, str) for task in self.tasks) or not self.tasks:
            raise ValueError(f"AdapterConfig: tasks is {self.tasks!r}, expected a tuple of task names, as ('vqa',)")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        wrong = [task for task in self.tasks if not task or "." in task]
        if wrong or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"AdapterConfig: tasks is {self.tasks}, expected different names without dots")
        for name, values in (("sharing", SHARINGS), ("shared", ("up", "down")), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"AdapterConfig: {name} is {getattr(self, name)!r}, expected one of {', '.join(values)}"
                )
        for name in ("bottleneck", "reduction_factor"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"AdapterConfig: {name} is {value!r}, expected an integer >= 1 or None")
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError("AdapterConfig: bottleneck and reduction_factor are both given, expected one of them")
        for name in ("norm_before", "norm_after", "cross_attention", "train_norms", "train_visual", "train_head"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "train_norms" and value is None):
                raise ValueError(f"AdapterConfig: {name} is {value!r}, expected True or False")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", self._own_prompts())

    def _own_prompts(self) -> PromptConfig:
        """`prompts` of this configuration's tasks."""
        from fastpetl.methods.prompt import PromptConfig

        given = PromptConfig(**self.prompts) if isinstance(self.prompts, dict) else self.prompts
        if not isinstance(given, PromptConfig):
            raise ValueError(f"{type(self).__name__}: prompts is {given!r}, expected a PromptConfig or None")
        own = PromptConfig(tasks=self.tasks, sharing=given.sharing, length=given.length, middle=given.middle)
        if replace(given, tasks=self.tasks) != own:  # what trains is said in one place
            raise ValueError(
                f"{type(self).__name__}: prompts is {given}, expected only tasks, sharing, length and middle in it; "
                "the rest is said beside it"
            )
        return own

    @property
    def parts(self) -> tuple[AdapterConfig, ...]:
        """Semantics: the configurations to attach, one after the other: this one and its prompts'."""
        return (self,) if self.prompts is None else (self, self.prompts)

    def resolved(self, family, host) -> AdapterConfig:
        """Semantics: this configuration with every size a number and every default named, for the model found."""
        hidden, factor = family.hidden(host), self.reduction_factor or 8
        if self.bottleneck is None and factor > hidden:
            raise ValueError(f"AdapterConfig: reduction_factor is {factor}, expected at most the hidden size {hidden}")
        norms = family.trains_norms if self.train_norms is None else self.train_norms
        return replace(self, bottleneck=self.bottleneck or hidden // factor, reduction_factor=None, train_norms=norms)

    def site(self, hidden: int, std: float | None, **made):
        """Semantics: the module that adapts one sublayer's output. std: of N(0, std), None for torch's own way."""
        from fastpetl.nn.adapter_controller import AdapterController

        names = ("sharing", "shared", "activation", "norm_before", "norm_after")
        same = {name: getattr(self, name) for name in names}
        return AdapterController(hidden, self.bottleneck, self.tasks, make=self._make(hidden), std=std, **same, **made)

    def _make(self, hidden: int):
        """How one task's adapter of another kind than VL-Adapter's own is made."""
        return None

    def place(self, family, model, host):
        """Semantics: the module that the family attaches this to."""
        return host

    def added(self, model, host, family) -> None:
        """Semantics: what is added beside the sites, once these are there."""

    def removed(self, model, host) -> None:
        """Semantics: undoes `added`."""

    def to_dict(self) -> dict:
        return asdict(self)

    def trainable(self, name: str) -> bool:
        """Semantics: does this configuration train the parameter of this name?"""
        parts = name.split(".")
        if "prompt_modules" in parts:
            return True
        if FROZEN & set(parts):
            return False
        if HEADS & set(parts):
            return self.train_head
        if "visual_embedding" in parts:
            return self.train_visual and "obj_order_embedding" not in parts
        if any(part.endswith("_adapter") for part in parts):
            return True
        return bool(self.train_norms) and is_norm(parts)
