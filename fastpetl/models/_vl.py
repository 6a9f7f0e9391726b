"""What VL-BART and VL-T5 share: the visual embedding, the joint mask, the loss, and the originals' checkpoints.

Source: ylsung/VL_adapter (CVPR 2022) and j-min/VL-T5 (ICML 2021); parameter names are theirs.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

VISUAL = ("vis_feats", "vis_boxes", "img_order_ids", "obj_order_ids")
REDUCTIONS = ("sample", "token", "none")


class VisualEmbedding(nn.Module):
    """Semantics: norm(Linear(feats)) + norm(Linear([boxes, area])) + image order + object order, [B, N', d].

    feats [B, images, N, F]: the images follow one another, N' = images * n; or [B, images * N, F], as many images as
    img_order_ids names (one without). With `downsample` the
    N features of an image, a square grid, are max-pooled to n = n_boxes first. boxes [B, (images,) N, 4] are zeros if
    not given (grid features have none), cut to the first n. img_order_ids and obj_order_ids [B or 1, (images,) n]
    number the images (0, 1, ...) and the features within each (0, 1, ...) unless given. Object order reads the word
    embedding from its end: row vocab_size - 1 - id, a tensor shared with the language model.
    """

    def __init__(self, config, norm):
        super().__init__()
        d = config.d_model
        self.feat_embedding = nn.Sequential(nn.Linear(config.feat_dim, d), norm(d))
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(config.pos_dim + 1, d), norm(d))
        self.img_order_embedding = nn.Embedding(config.n_images, d)
        self.obj_order_embedding = nn.Embedding(config.vocab_size, d)
        self.n_boxes, self.downsample = config.n_boxes, config.downsample

    def forward(self, feats, boxes=None, img_order_ids=None, obj_order_ids=None):
        if feats.dim() not in (3, 4):
            raise ValueError(
                f"VisualEmbedding: vis_feats has shape {tuple(feats.shape)}, expected [batch, features, channels] or "
                "[batch, images, features, channels]"
            )
        if feats.dim() == 3:  # images end to end, as the originals pass them: their ids say how many
            images = 1 if img_order_ids is None else int(img_order_ids.max()) + 1
            if feats.shape[1] % images:
                raise ValueError(
                    f"VisualEmbedding: vis_feats has {feats.shape[1]} features, expected a multiple of the {images} "
                    "images that img_order_ids names"
                )
            feats = feats.unflatten(1, (images, -1))
            boxes = boxes if boxes is None or boxes.dim() == 4 else boxes.unflatten(1, (images, -1))
        feats = self._pool(feats)
        batch, images, n, _ = feats.shape
        if images > self.img_order_embedding.num_embeddings:
            raise ValueError(
                f"VisualEmbedding: vis_feats has {images} images, expected at most n_images="
                f"{self.img_order_embedding.num_embeddings}"
            )
        out = self.feat_embedding(feats) + self._position(boxes, feats)
        rows = torch.arange(images, device=feats.device)[:, None] if img_order_ids is None else img_order_ids
        out = out + self.img_order_embedding(rows if img_order_ids is None else self._ids(rows, images, n))
        objects = torch.arange(n, device=feats.device) if obj_order_ids is None else self._ids(obj_order_ids, images, n)
        words = self.obj_order_embedding
        return (out + words(words.num_embeddings - 1 - objects)).flatten(1, 2)

    def _pool(self, feats):
        batch, images, n, channels = feats.shape
        if not self.downsample or n == self.n_boxes:
            return feats
        side, target = math.isqrt(n), math.isqrt(self.n_boxes)
        if side * side != n or target * target != self.n_boxes:
            raise ValueError(
                f"VisualEmbedding: vis_feats has {n} features to be pooled to n_boxes={self.n_boxes}, expected two "
                "squares (a grid of features), or downsample=False in the configuration"
            )
        grid = feats.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
        pooled = F.adaptive_max_pool2d(grid, target)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (batch, images))

    def _position(self, boxes, feats):
        if boxes is None:  # the same vector everywhere: computed once
            return self.absolute_vis_pos_embedding(feats.new_zeros(1, 1, 1, 5))
        boxes = (boxes if boxes.dim() == 4 else boxes[:, None])[:, :, : feats.shape[2]].to(feats.dtype)
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
        return self.absolute_vis_pos_embedding(torch.cat([boxes, area[..., None]], -1))

    @staticmethod
    def _ids(ids, images, n):
        """[B, images, n] of ids per image, or [B, images * m] with m >= n, as the originals pass them."""
        return (ids if ids.dim() == 3 else ids.unflatten(1, (images, -1)))[..., :n]


def text_mask(attention_mask, input_ids, pad_token_id):
    """Semantics: the mask over the text, by the padding where none is given."""
    if attention_mask is None and input_ids is not None:
        return input_ids.ne(pad_token_id).long()
    return attention_mask


def joint_mask(attention_mask, length: int, prompts: int = 0):
    """Semantics: a text mask [B, T] with ones for `prompts` vectors before and the visual tokens after the text,
    [B, length].
    """
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] >= length:
        return attention_mask
    return F.pad(attention_mask, (prompts, length - prompts - attention_mask.shape[1]), value=1)


def sequence_loss(logits, labels, scores=None, reduction: str = "sample"):
    """Semantics: cross entropy of the labels that are not -100.

    reduction "sample": the mean over each sample's tokens, times scores [B] if given (VQA's soft targets), then the
    mean over samples; "token": the mean over all tokens; "none": [B, T].
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"sequence_loss: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if scores is not None and reduction != "sample":
        raise ValueError(f"sequence_loss: scores are given with reduction={reduction!r}, expected 'sample'")
    # Rows, not a transposed view: the softmax then reads memory in order (4x less time at BART's 50,465 words).
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    loss = loss.view(labels.shape)
    if reduction == "none":
        return loss
    kept = labels.ne(-100)
    if reduction == "token":
        return loss.sum() / kept.sum()
    per_sample = loss.sum(1) / kept.sum(1).clamp(min=1)
    return (per_sample if scores is None else per_sample * scores).mean()


# --- the originals' checkpoints ---------------------------------------------------------------------------------------


def read_original(source) -> dict[str, torch.Tensor]:
    """Semantics: the state_dict in a file of the original's (LAST.pth) or given; DDP's "module." is taken off."""
    if isinstance(source, (str, Path)):
        source = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(source, dict):
        raise TypeError(f"from_original: source is {type(source).__name__}, expected a path or a state_dict")
    return {name.removeprefix("module."): value for name, value in source.items()}


def load_original(model_class, source, config, sizes):
    """Semantics: a model of the checkpoint's sizes with its weights, adapters attached if it has them.

    config: None, or the configuration, where the sizes cannot be read off the shapes (heads, dropout). sizes(state):
    the configuration's fields that can.
    """
    from fastpetl.methods import attach
    from fastpetl.methods import load_original as load
    from fastpetl.methods.original import config_of

    state = read_original(source)
    if "shared.weight" not in state and "model.shared.weight" not in state:
        raise ValueError(f"from_original: the state_dict has no shared.weight, expected a {model_class.__name__}'s")
    model = model_class(model_class.config_class(**sizes(state)) if config is None else config)
    method = config_of(state)
    if method is not None:
        attach(model, method, patch=False)
    return load(model, state).eval()


def count_layers(state, prefix: str) -> int:
    """Semantics: how many numbered modules `prefix`.0, .1, ... have parameters in `state`."""
    parts = prefix.count(".") + 1
    return len({name.split(".")[parts] for name in state if name.startswith(prefix + ".")})
