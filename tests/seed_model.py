"""The seed guide's model as its script defines it: the reference for the `seed` preset."""

# ruff: noqa
import torch
import torch.nn as nn
import torch.nn.functional as F


class BitLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=False):
        super(BitLinear, self).__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.Tensor(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=torch.math.sqrt(5))

    def forward(self, x):
        scaling_factor = self.weight.abs().mean()
        quantized_weight = torch.round(self.weight / scaling_factor).clamp(-1, 1)
        ste_weight = (quantized_weight - self.weight).detach() + self.weight
        return F.linear(x, ste_weight) * scaling_factor


class AtencionMultiCabeza(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super(AtencionMultiCabeza, self).__init__()
        assert embed_dim % num_heads == 0
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.q_proj = BitLinear(embed_dim, embed_dim)
        self.k_proj = BitLinear(embed_dim, embed_dim)
        self.v_proj = BitLinear(embed_dim, embed_dim)
        self.out_proj = BitLinear(embed_dim, embed_dim)

    def forward(self, x, mask=None):
        batch_size, seq_length, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(batch_size, seq_length, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch_size, seq_length, self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch_size, seq_length, self.num_heads, self.head_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / torch.math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        context = torch.matmul(F.softmax(scores, dim=-1), v)
        context = context.transpose(1, 2).contiguous().view(batch_size, seq_length, self.embed_dim)
        return self.out_proj(context)


class FeedForward(nn.Module):
    def __init__(self, embed_dim, ff_dim):
        super(FeedForward, self).__init__()
        self.w_1, self.w_2 = BitLinear(embed_dim, ff_dim), BitLinear(ff_dim, embed_dim)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.w_2(self.activation(self.w_1(x)))


class BloqueTransformer(nn.Module):
    def __init__(self, embed_dim, num_heads, ff_dim):
        super(BloqueTransformer, self).__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attn = AtencionMultiCabeza(embed_dim, num_heads)
        self.ff = FeedForward(embed_dim, ff_dim)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        x = x + self.ff(self.norm2(x))
        return x


class MiLLM(nn.Module):
    def __init__(self, vocab_size, embed_dim, num_heads, ff_dim, num_layers, max_seq_len):
        super(MiLLM, self).__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_seq_len, embed_dim)
        self.layers = nn.ModuleList(
            [BloqueTransformer(embed_dim, num_heads, ff_dim) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.output_layer = BitLinear(embed_dim, vocab_size)

    def forward(self, input_ids):
        seq_len = input_ids.size(1)
        position_ids = torch.arange(0, seq_len, dtype=torch.long, device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        mask = torch.triu(torch.ones(seq_len, seq_len, device=input_ids.device), diagonal=1).bool()
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.output_layer(self.norm(x))
