"""Stand-ins for research code that people copy: the children and the arithmetic of ViLT's Block and DAS's adapter."""

import torch
from torch import nn
from torch.nn import functional as F


class Adapter_Layer(nn.Module):
    def __init__(self, width, bottleneck, dropout=0.0, scalar=1.0, option="in"):
        super().__init__()
        self.adapter_layernorm_option = option
        self.adapter_layer_norm_before = None
        if option in ("in", "out"):
            self.adapter_layer_norm_before = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(1)) if scalar == "learnable_scalar" else float(scalar)
        self.down_proj, self.non_linear_func = nn.Linear(width, bottleneck), nn.ReLU()
        self.up_proj = nn.Linear(bottleneck, width)
        self.dropout = dropout

    def forward(self, x, add_residual=True, residual=None):
        residual = x if residual is None else residual
        h = self.adapter_layer_norm_before(x) if self.adapter_layernorm_option == "in" else x
        h = F.dropout(F.relu(self.down_proj(h)), self.dropout, self.training)
        h = self.up_proj(h) * self.scale
        if self.adapter_layernorm_option == "out":
            h = self.adapter_layer_norm_before(h)
        return h + residual if add_residual else h


class Attention(nn.Module):
    def __init__(self, width, heads, drop, attn_drop):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(width, 3 * width), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Dropout(drop)

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None], float("-inf"))
        weights = self.attn_drop(scores.softmax(-1))
        h = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(h)), weights


class Mlp(nn.Module):
    def __init__(self, width, drop, act):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), act, nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    def forward(self, x):
        keep = torch.rand(x.shape[0], 1, 1) < 0.5
        return x * keep / 0.5 if self.training else x


class Block(nn.Module):
    def __init__(self, width=16, heads=2, drop=0.0, attn_drop=0.0, drop_path=False, act=None):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, drop, attn_drop)
        self.drop_path = DropPath() if drop_path else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, drop, act or nn.GELU())

    def forward(self, x, mask=None):
        f, weights = self.attn(self.norm1(x), mask=mask)
        x = x + self.drop_path(f)
        return x + self.drop_path(self.mlp(self.norm2(x))), weights


class AdapterBlock(Block):
    def __init__(self, width=16, bottleneck=6, adapter=None, **kwargs):
        super().__init__(width, **kwargs)
        self.adapter0 = Adapter_Layer(width, bottleneck, **(adapter or {}))
        self.adapter1 = Adapter_Layer(width, bottleneck, **(adapter or {}))

    def forward(self, x, mask=None):
        f, weights = self.attn(self.norm1(x), mask=mask)
        x = x + self.drop_path(f) + self.adapter0(x, add_residual=False)
        return x + self.drop_path(self.mlp(self.norm2(x))) + self.adapter1(x, add_residual=False), weights


class Stack(nn.Module):
    """Blocks as the original's transformer calls them, and the shortcut adapters DAS keeps beside them."""

    def __init__(self, block=AdapterBlock, layers=3, **kwargs):
        super().__init__()
        self.blocks = nn.ModuleList(block(**kwargs) for _ in range(layers))
        self.adapter_list = nn.ModuleList(nn.Sequential(Adapter_Layer(16, 8)) for _ in range(layers))
        self.skip = ()

    def forward(self, x, mask=None):
        for i, block in enumerate(self.blocks):
            x = self.adapter_list[i](x) if i in self.skip else block(x, mask=mask)[0]
        return x
