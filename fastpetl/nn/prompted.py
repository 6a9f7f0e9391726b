"""Prompts among the words or patches of encoders whose callers see nothing of them: BERT, RoBERTa, CLIP, ViLT.

Mixins, each before the library's class (`fastpetl.nn.prompt.with_prompts`). VL-Adapter has prompts in front of the text
its encoder reads; here they stand behind the first token, where pooling finds that one as before. To attention that
sees both ways the two are the same.
"""

from __future__ import annotations

import torch

from fastpetl.nn.tasks import Told


def behind_first(x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Semantics: [x's first token; more; x's others], along dimension 1."""
    return torch.cat([x[:, :1], more, x[:, 1:]], 1)


def without(x: torch.Tensor, length: int, *dims: int) -> torch.Tensor:
    """Semantics: x without the `length` entries that `behind_first` put in, along each of the dimensions."""
    for dim in dims:
        x = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1 + length, x.shape[dim] - 1 - length)], dim)
    return x


class PromptedEmbeddings(Told):
    """Mixin of an embedding module. Semantics: [first token; prompts; others], the prompts normed and dropped as words
    are, where words are; they have no positions and no token types.

    Has one more child, `prompt_modules`, and is told the task by the model (`Prompted`).
    """

    def forward(self, *args, **kwargs):
        x = super().forward(*args, **kwargs)
        prompts = self.prompt_modules(x.shape[0], task=self._fastpetl_current).to(x.dtype)
        norm = self._modules.get("LayerNorm")
        return behind_first(x, prompts if norm is None else self.dropout(norm(prompts)))


class Prompted:
    """Mixin of a model with `PromptedEmbeddings`. Semantics: the model's own outputs for the tokens it was given;
    attention maps are the given tokens' among themselves, whose rows lack what the prompts got.
    """

    _embeddings, _cut = "embeddings", ("last_hidden_state",)

    def forward(self, *args, task=None, return_dict=None, **kwargs):
        embeddings = self.get_submodule(self._embeddings)
        embeddings.__dict__["_fastpetl_current"] = task
        told = {} if task is None else {"task": task}
        out = super().forward(*args, return_dict=True, **told, **kwargs)
        length = embeddings.prompt_modules.length
        for name in self._cut:
            out[name] = without(out[name], length, 1)
        for name, dims in (("hidden_states", (1,)), ("attentions", (-2, -1))):
            if out.get(name) is not None:
                out[name] = tuple(None if t is None else without(t, length, *dims) for t in out[name])
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else self._as_tuple(out)

    def _as_tuple(self, out) -> tuple:
        return out.to_tuple()

    def _seen(self, mask):
        """A mask over the text [batch, T] with ones for the prompts."""
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: attention_mask has shape {tuple(mask.shape)}, expected (batch, text): it has "
                "prompts"
            )
        length = self.get_submodule(self._embeddings).prompt_modules.length
        return behind_first(mask, mask.new_ones(mask.shape[0], length))


class PromptedText(Prompted):
    """`Prompted` of a model with text and a mask over it."""

    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        return super().forward(input_ids, self._seen(attention_mask), *args, **kwargs)


class PromptedCLIPText(PromptedText):
    """`PromptedText` of a CLIPTextModel: its encoder, a `PromptedEncoder`, gives the text alone, in which the model
    looks for the last token. To its causal attention the prompts' place is CoOp's: all tokens but the first see them.
    """

    _cut = ()


class PromptedEncoder:
    """Mixin of a CLIPEncoder behind `PromptedEmbeddings`. Semantics: the encoder's output without the prompts."""

    _fastpetl_prompts: int

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = without(out.last_hidden_state, self._fastpetl_prompts, 1)
        return out


class PromptedVilt(PromptedText):
    """`PromptedText` of a ViltModel, whose image follows the text."""

    _embeddings = "embeddings.text_embeddings"

    def forward(self, input_ids=None, attention_mask=None, *args, task=None, inputs_embeds=None, **kwargs):
        if task is not None:
            raise ValueError("ViltModel: task is given, expected fastpetl.task(model, name): its layers are not told")
        if attention_mask is None:
            text = inputs_embeds if input_ids is None else input_ids
            attention_mask = None if text is None else text.new_ones(text.shape[:2])
        return super().forward(input_ids, attention_mask, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _as_tuple(self, out) -> tuple:
        asked = (t for t in (out.hidden_states, out.attentions) if t is not None)
        return (out.last_hidden_state, out.pooler_output, *asked)
