"""Models as users write them: a class derived from Llama's with a few lines of their own."""

import random
from itertools import pairwise

import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


class OwnConfig(transformers.LlamaConfig):
    """``change``: the name of the function below that changes the model after it was built."""

    model_type = "own_llama"
    change = ""


class OwnModel(LlamaForCausalLM):
    """Llama with the change that its config names."""

    config_class = OwnConfig
    _no_split_modules = [*LlamaForCausalLM._no_split_modules, "Leaving", "Scaled", "Branch"]
    _keep_in_fp32_modules_strict = ["scaled_by"]

    def __init__(self, config):
        super().__init__(config)
        CHANGES[config.change](self)
        self.post_init()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if "loss" in output:
            output["loss"] = output["loss"] + sum(m.penalty for m in self.modules() if isinstance(m, Routed))
        return output


class Sloped(LlamaMLP):
    """Scales its output by numbers that it computes when it is made, and that no checkpoint has."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("slopes", 1 / torch.arange(1.0, config.hidden_size + 1), persistent=False)
        self.register_buffer("order", torch.arange(config.hidden_size).flip(0), persistent=False)
        self.register_buffer("later", torch.arange(3.0))  # which checkpoints of an older version lack

    def forward(self, hidden):
        return super().forward(hidden)[..., self.order] * self.slopes


class Lucky(LlamaMLP):
    """Returns nothing at times, as drawn by the generator of Python."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = 0.5

    def forward(self, hidden):
        left_out = self.training and random.random() < self.rate
        return torch.zeros_like(hidden) if left_out else super().forward(hidden)


class Counting(LlamaMLP):
    """Counts its forwards, the same on every rank."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return super().forward(x) * (1 + 0.01 * self.seen)


class Running(LlamaMLP):
    """Subtracts the running mean of what it was given, of which each rank has its own."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.hidden_size))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return super().forward(x - self.mean)


class Mixing(LlamaMLP):
    """Subtracts the mean of the rows of the batch."""

    def forward(self, x):
        return super().forward(x - 0.1 * x.mean(0, keepdim=True))


class MixingInTraining(LlamaMLP):
    """Subtracts, in training, the mean of all rows, of all tokens or of all features, by ``dim``."""

    def __init__(self, config):
        super().__init__(config)
        self.dim = ("rows", "tokens", "features").index(config.change.partition(" ")[0])

    def forward(self, x):
        features = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.training:
            features = nn.functional.dropout(features, 0.1)
            features = features - 0.5 * features.mean(self.dim, keepdim=True)
        return self.down_proj(features)


class Remembering(LlamaMLP):
    """Keeps a running mean in a plain attribute, and uses it in evaluation only."""

    mean = 0.0

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
            return super().forward(x)
        return super().forward(x - self.mean)


class Noting(LlamaMLP):
    """Keeps its last output, of which nothing depends, and draws noise for every row."""

    def forward(self, x):
        noise = 1 + 0.1 * torch.randn(len(x), 1, 1) if self.training else 1.0
        self.last = super().forward(nn.functional.dropout(x * noise, 0.1, self.training))
        return self.last


class Renormed(LlamaMLP):
    """Keeps the rows of a weight at one norm, in place."""

    def forward(self, x):
        with torch.no_grad():
            self.up_proj.weight.div_(self.up_proj.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


class Noisy(LlamaMLP):
    """Draws noise for every row by a generator that is not torch's."""

    def forward(self, x):
        noise = torch.tensor([random.random() for _ in x])[:, None, None] if self.training else 1.0
        return super().forward(x * noise)


class Normalising(LlamaMLP):
    """Normalises what it is given by the statistics of the batch."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.hidden_size)

    def forward(self, x):
        return super().forward(self.norm(x.mT).mT)


class Drawing(nn.Embedding):
    """Draws in training, before the blocks: by dropout, or other tokens by integers or the generator of Python."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size)
        self.way = config.change

    def forward(self, tokens):
        if self.training and self.way == "drawing integers":
            tokens = (tokens + torch.randint(0, 9, tokens.shape)) % self.num_embeddings
        elif self.training and self.way == "drawing by Python":
            tokens = (tokens + random.randrange(9)) % self.num_embeddings
        return nn.functional.dropout(super().forward(tokens), 0.1, self.training)


class Around(OwnModel):
    """Does all outside its layers: counts its forwards, draws by the generator of Python, normalises by the batch."""

    forwards = 0

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.vocab_size)

    def forward(self, input_ids=None, **kwargs):
        self.forwards += 1
        embedded = self.model.embed_tokens(input_ids) * (random.random() + self.forwards)
        output = super().forward(inputs_embeds=embedded, **kwargs)
        output["logits"] = self.norm(output["logits"].mT).mT
        return output


class Masked(OwnModel):
    """Divides the hidden states of a row by how many tokens rows have on average."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hook = self.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * self._share(attention_mask),))
        try:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()

    def _share(self, mask):
        return 1.0 if mask is None else (mask.sum(-1) / mask.sum(-1).float().mean())[:, None, None]


class WeighingConfig(OwnConfig):
    """Of the model below."""

    model_type = "weighing_llama"


class Weighing(OwnModel):
    """Weighs the losses of tokens by numbers in the batch."""

    config_class = WeighingConfig

    def forward(self, input_ids=None, labels=None, loss_weights=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None and loss_weights is not None:
            losses = nn.functional.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], reduction="none")
            output["loss"] = (losses * loss_weights[:, 1:]).sum() / loss_weights[:, 1:].sum()
        return output


class Sharing(OwnModel):
    """Scales the logits of a row by its share in numbers in the batch."""

    def forward(self, input_ids=None, shares=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if shares is not None:
            output["logits"] = output["logits"] * (shares / shares.mean())[:, None, None]
        return output


class Relabelling(OwnModel):
    """Takes the tokens for labels."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        if labels is not None:
            labels = input_ids.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)


class LeavingOut(OwnModel):
    """Leaves out the first labels, in the batch that it is given."""

    def forward(self, labels=None, **kwargs):
        if labels is not None:
            labels[:, :2] = -100
        return super().forward(labels=labels, **kwargs)


class Penalised(OwnModel):
    """Adds to its loss, in training, what is no mean over tokens."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if "loss" in output and self.training:
            output["loss"] = output["loss"] + output["logits"].mean((0, 1)).square().sum()
        return output


class Routed(nn.Module):
    """Two experts for every token, with a penalty that is no mean over tokens."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 2, bias=False)
        self.first, self.second = LlamaMLP(config), LlamaMLP(config)

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        self.penalty = (share.mean((0, 1)) ** 2).sum()
        return share[..., :1] * self.first(x) + share[..., 1:] * self.second(x)


class Twice(LlamaDecoderLayer):
    """A layer that is run twice."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(super().forward(hidden_states, **kwargs), **kwargs)


class Skipping(LlamaDecoderLayer):
    """Skips itself by a number of the first row: ranks decide otherwise, and would wait for each other."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states if hidden_states[0, 0, 0] > 0 else super().forward(hidden_states, **kwargs)


class Gated(LlamaMLP):
    """Has a parameter that is a single number."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) * self.gate.tanh()


class Calling(LlamaDecoderLayer):
    """Runs a projection of its feed-forward by itself, too."""

    def forward(self, hidden_states, **kwargs):
        features = self.mlp.up_proj(hidden_states)
        return super().forward(hidden_states, **kwargs) + 0.1 * features.mean(-1, keepdim=True)


class Scaled(LlamaDecoderLayer):
    """Has a parameter that stays in float32 in a model of half precision."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.scaled_by = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * self.scaled_by.to(hidden_states.dtype)


class Leaving(LlamaDecoderLayer):
    """Leaves something for the next block in a dict that all are given."""

    def forward(self, hidden_states, box=None, **kwargs):
        first = box.setdefault("first", hidden_states)
        return super().forward(hidden_states, **kwargs) + 0.5 * first


class Following(LlamaDecoderLayer):
    """Adds what the block before it made, past the hidden states."""

    before = (None,)  # in a tuple, which holds no modules

    def forward(self, hidden_states, **kwargs):
        made = super().forward(hidden_states, **kwargs)
        self.made = made - hidden_states
        return made if self.before[0] is None else made + 0.5 * self.before[0].made


class Reaching(LlamaModel):
    """Runs the modules of its blocks by itself, not the blocks, and reads the weight of one."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        hidden = hidden + 0.1 * nn.functional.linear(hidden, self.layers[0].self_attn.o_proj.weight)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None] if position_ids is None else position_ids
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            normed = layer.input_layernorm(hidden)
            hidden = hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class Returning(LlamaModel):
    """Adds, in training, the embedding of the tokens after its blocks again."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if self.training:
            output.last_hidden_state = output.last_hidden_state + 0.5 * self.embed_tokens(input_ids)
        return output


class Experts(nn.Module):
    """Runs only those experts that some token chose, as ranks with other tokens do with others."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 6, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(6))

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if chosen.any():
                out[chosen] = expert(x[chosen]) * weight[chosen][:, None]
        return out


class Empty(LlamaMLP):
    """Has a parameter without elements."""

    def __init__(self, config):
        super().__init__(config)
        self.none = nn.Parameter(torch.ones(0, 8))

    def forward(self, x):
        return super().forward(x) + self.none.sum()


class Transposed(LlamaMLP):
    """Has a parameter that is a transposed view."""

    def __init__(self, config):
        super().__init__(config)
        rows = torch.linspace(-1, 1, self.up_proj.weight.numel()).view(config.hidden_size, config.intermediate_size)
        self.up_proj.weight = nn.Parameter(rows.t())


class Branch(nn.Linear):
    """A block, that FSDP2 gathers by itself."""


class Branching(LlamaModel):
    """Ends with one of several projections, as the batch says."""

    kind = nn.Linear

    def __init__(self, config):
        super().__init__(config)
        self.branches = nn.ModuleList(self.kind(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, input_ids=None, branch=0, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state + self.branches[branch](out.last_hidden_state)
        return out


class BranchingBlocks(Branching):
    """The same, where each of them is a block."""

    kind = Branch


class Boxed(LlamaModel):
    """Gives all blocks one dict."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, box={"rows": len(input_ids)}, **kwargs)


def _feed_forwards(kind):
    def change(model):
        for layer in model.model.layers:
            layer.mlp = kind(model.config)

    return change


def _second_layer(kind):
    def change(model):
        model.model.layers[1] = kind(model.config, 1)

    return change


def _layers(kind):
    def change(model):
        model.model.layers = nn.ModuleList(kind(model.config, index) for index in range(len(model.model.layers)))

    return change


def _share(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp


def _share_norms(model):
    for layer in model.model.layers[1:]:
        layer.input_layernorm = model.model.layers[0].input_layernorm


def _share_weights(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight


def _freeze(model):
    model.model.layers[0].requires_grad_(False)


def _draw(model):
    model.model.embed_tokens = Drawing(model.config)


def _follow(model):
    _layers(Following)(model)
    for before, layer in pairwise(model.model.layers):
        layer.before = (before,)


def _normed(model):
    for layer in model.model.layers:
        weight_norm(layer.self_attn.o_proj)


def _computed(model):
    """Have weights that are computed before every forward, in a block and in the head."""
    for layer in model.model.layers:
        nn.utils.weight_norm(layer.self_attn.o_proj)  # deprecated, and in use
        prune.identity(layer.mlp.up_proj, "weight")
    nn.utils.weight_norm(model.lm_head)


def _spectral(model):
    for layer in model.model.layers:
        spectral_norm(layer.mlp.down_proj)


def _leave(model):
    _inner(Boxed)(model)
    _layers(Leaving)(model)


def _inner(kind):
    def change(model):
        model.model = kind(model.config)

    return change


CHANGES = {
    "": lambda model: None,
    "sloped": _feed_forwards(Sloped),
    "lucky": _feed_forwards(Lucky),
    "counting": _feed_forwards(Counting),
    "running": _feed_forwards(Running),
    "rows in training": _feed_forwards(MixingInTraining),
    "tokens in training": _feed_forwards(MixingInTraining),
    "features in training": _feed_forwards(MixingInTraining),
    "remembering": _feed_forwards(Remembering),
    "noting": _feed_forwards(Noting),
    "noisy": _feed_forwards(Noisy),
    "spectral": _spectral,
    "normalising": _feed_forwards(Normalising),
    "drawing": _draw,
    "drawing integers": _draw,
    "drawing by Python": _draw,
    "mixing": _feed_forwards(Mixing),
    "routed": _feed_forwards(Routed),
    "gated": _feed_forwards(Gated),
    "twice": _second_layer(Twice),
    "skipping": _second_layer(Skipping),
    "calling": _layers(Calling),
    "scaled": _layers(Scaled),
    "following": _follow,
    "leaving": _leave,
    "reaching": _inner(Reaching),
    "returning": _inner(Returning),
    "normed": _normed,
    "computed": _computed,
    "experts": _feed_forwards(Experts),
    "empty": _feed_forwards(Empty),
    "transposed": _feed_forwards(Transposed),
    "renormed": _feed_forwards(Renormed),
    "sharing": _share,
    "sharing norms": _share_norms,
    "sharing weights": _share_weights,
    "freezing": _freeze,
    "branching": _inner(Branching),
    "branching blocks": _inner(BranchingBlocks),
}

transformers.AutoConfig.register("own_llama", OwnConfig)
transformers.AutoModelForCausalLM.register(OwnConfig, OwnModel)
transformers.AutoConfig.register("weighing_llama", WeighingConfig)
transformers.AutoModelForCausalLM.register(WeighingConfig, Weighing)


def on_meta(change, kind=OwnModel):
    """Return the model with *change*, without weights."""
    with torch.device("meta"):
        return kind(kind.config_class(**SIZES, change=change))
