"""PPD, Personalized Preference Fine-tuning of Diffusion Models: the method, in one file.

One frozen text-to-image model serves every user. A user is a vector u (embed.py makes it from four
of their choices). UserAdapter turns u into a few tokens and, for every attention layer of the base,
into keys K' and values V'; UserAttnProcessor adds attention over them to the layer's own (Eq. 7).
Only the adapter is trained, with ppd_loss (Eq. 6): Diffusion-DPO, conditioned on the user. The
reference model is the same network with the user branch off, so there is no second copy of it.

    base = load_base("tiny")                      # or "stabilityai/stable-cascade-prior"
    adapter = UserAdapter.load("assets/onehot").install(base.attention_layers())
    user = load_user("assets/onehot/light.pt")["embedding"][:1, -1]             # (1, D)
    with adapter.user(adapter(user)):             # the user is set inside this block only
        noise_pred = base.predict(x_t, t, *base.encode_prompts(["a red star"]))

Read in this order: UserAdapter, UserAttnProcessor, ppd_loss; then train.micro_step, where they
meet. Equation and section numbers are the paper's, https://arxiv.org/abs/2501.06655.
"""

import contextlib
import json
from pathlib import Path

import einops
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from utils import InputError, first_line, read_safetensors, write_atomically


# ---------------------------------------------------------------- the adapter (Sec. 4.3)
class UserAdapter(nn.Module):
    """User embedding u -> user tokens -> K' and V' of every attention layer (Eq. 7).

    u is standardized, projected to a few tokens and layer-normalized, as IP-Adapter does with an
    image embedding; every layer then has its own W'_k and W'_v. V' starts at zero, so a new adapter
    changes nothing and the first loss is ln 2. One token would leave K' without a gradient (a
    softmax over one key is 1 whatever the key), hence several. The projector has biases, so the
    zero user (u = 0: the *mean* user, where embeddings are standardized) has tokens of its own and
    learns the population's taste. The reference sees no user term at all, not the zero user.

    user_dim: D, width of the user embedding
    channels: width of each attention layer, in the network's own order
    tokens, token_dim: number of user tokens L, and their width d
    bias: False takes the biases away, and with them the zero user: an ablation
    """

    def __init__(self, user_dim, channels, tokens=4, token_dim=64, bias=True):
        super().__init__()
        self.user_dim = user_dim
        self.channels = list(channels)
        self.n_tokens = tokens
        self.sizes = dict(user_dim=user_dim, tokens=tokens, token_dim=token_dim, bias=bias)
        self.register_buffer("mean", torch.zeros(user_dim))  # see set_statistics
        self.register_buffer("std", torch.ones(user_dim))
        self.project = nn.Linear(user_dim, tokens * token_dim, bias=bias)
        self.norm = nn.LayerNorm(token_dim, bias=bias)
        self.to_k = nn.ModuleList(nn.Linear(token_dim, c, bias=False) for c in channels)  # W'_k
        self.to_v = nn.ModuleList(nn.Linear(token_dim, c, bias=False) for c in channels)  # W'_v
        for layer in self.to_v:
            nn.init.zeros_(layer.weight)
        self.path = "this adapter"  # where load() read it from
        self.header = {}  # what the file's header says
        self.user_condition = None  # (tokens, scale) inside `with adapter.user(...)`
        self.compiled = False  # train.py --compile sets it; see reference()

    def set_statistics(self, embeddings):
        """Take mean and std from the training users' embeddings, (N, D). One-hot ones need none. A
        dimension that hardly varies counts as varying by 1% of the median: rounding makes some."""
        std = embeddings.std(0, correction=0)
        self.mean.copy_(embeddings.mean(0))
        self.std.copy_(std.clamp(min=max(0.01 * std.median().item(), 1e-6)))

    def forward(self, embedding, drop=None):
        """User embeddings (B, D) as read -> user tokens (B, L, d). They are standardized by the
        training users, to at most 5 deviations, so that one odd dimension cannot drown a user; the
        zero user is `mean`. drop: (B,) bool, True = the zero user (Sec. 4.3's random drop)."""
        u = ((embedding - self.mean) / self.std).clamp(-5, 5)
        if drop is not None:
            u = u.masked_fill(drop[:, None], 0)
        tokens = einops.rearrange(self.project(u), "b (l d) -> b l d", l=self.n_tokens)
        return self.norm(tokens)

    @contextlib.contextmanager
    def user(self, tokens, scale=1.0):
        """Inside the block the base predicts as the policy: every UserAttnProcessor reads these
        tokens. Keep backward inside too: activation checkpointing runs the layers again there.

        tokens: (B, L, d). The base then takes B rows, or r B: these users r times, in this order
        scale: multiplies the user term of Eq. 7
        """
        if self.compiled:
            scale = tokens.new_full((), scale)  # another float would compile again
        self.user_condition = (tokens, scale)
        try:
            yield
        finally:
            self.user_condition = None

    @contextlib.contextmanager
    def reference(self, tokens):
        """Inside the block the base predicts as the reference, without the user term.

        tokens: the policy's, used only if compiled. Graphs with and without a user would round
        differently then, and the first loss would miss ln 2: so the reference runs the policy's
        own graph, gradient and all, with the user term times 0. Detach what it gives.
        """
        if self.compiled:
            with self.user(tokens, scale=0.0):
                yield
        else:
            self.user_condition = None
            with torch.no_grad():
                yield

    def install(self, attention_layers):
        """Hook these layers (diffusers' Attention, frozen and cast already); returns self. Raises
        InputError if the adapter was made for layers of other widths."""
        widths = [layer.to_q.in_features for layer in attention_layers]
        if widths != self.channels:
            describe = "{} attention layers of widths {}".format
            ours = describe(len(self.channels), sorted(set(self.channels)))
            theirs = describe(len(widths), sorted(set(widths)))
            raise InputError(f"{self.path} is for a base with {ours}; this base has {theirs}")
        for layer, to_k, to_v in zip(attention_layers, self.to_k, self.to_v, strict=True):
            layer.set_processor(UserAttnProcessor(self, to_k, to_v))
        return self.to(attention_layers[0].to_q.weight.device)

    def save(self, path, **header):
        """Write the adapter's tensors alone as safetensors; sizes and `header` as its metadata."""
        header |= self.sizes | dict(channels=self.channels, format="ppd-adapter-1")
        metadata = {"ppd": json.dumps(header, sort_keys=True)}
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))

    @classmethod
    def load(cls, path):
        """Read what save() wrote; path is the file or its folder. Raises InputError, naming file
        and key, unless every tensor is there in its right shape, finite, and no other is."""
        path = Path(path, "adapter.safetensors") if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such adapter file; train.py writes runs/<name>")
        metadata, state = read_safetensors(path)
        try:
            header = dict(json.loads(metadata.get("ppd", "{}")))
            if header.get("format") != "ppd-adapter-1":
                raise ValueError(f"its header says format {header.get('format')!r}")
            sizes = {key: header[key] for key in ("user_dim", "channels", "tokens", "token_dim")}
            with torch.device("meta"):  # no memory yet, whatever size the header says
                adapter = cls(**sizes, bias=header.get("bias", True))
            adapter.load_state_dict(state, assign=True)  # strict: every key, every shape
            for name, tensor in state.items():
                if not tensor.isfinite().all() or tensor.dtype != state["mean"].dtype:
                    raise ValueError(f"{name} is not finite, or of another precision than mean")
            if not (adapter.std > 0).all():
                raise ValueError("std is not above 0")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = first_line(error, 200)
            raise InputError(f"{path}: no usable PPD adapter ({reason})") from None
        adapter.path = path
        adapter.header = header
        return adapter


class UserAttnProcessor:
    """Decoupled cross-attention, Eq. 7: Z' = Attention(Q, K, V) + scale * Attention(Q, K', V').

    After https://github.com/tencent-ailab/IP-Adapter/blob/main/ip_adapter/attention_processor.py.
    Both terms share the query and the layer's own output projection. diffusers calls it: the
    block's forward -> Attention.forward -> here, once an attention layer and forward pass.
    Deliberately no nn.Module: as one it would move into the base's state dict, and freezing or
    casting the base would freeze or cast the adapter.
    """

    def __init__(self, adapter, to_k, to_v):
        self.adapter = adapter
        self.to_k = to_k  # W'_k of this layer
        self.to_v = to_v  # W'_v of this layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """What a diffusers attention processor takes and gives.

        attn: the layer, for its projections and number of heads
        hidden_states: (R, C, H, W) in Stage C, else (R, N, C), the positions of R images, which ask
        encoder_hidden_states: (R, M, C), what is attended to; in Stage C the image's own positions
            and the text together, so this one softmax is self- and text cross-attention
        attention_mask: (R, 1, M), added to the scores, or None; the user's tokens have none
        """
        n_images = len(hidden_states)
        is_map = hidden_states.ndim == 4
        x = einops.rearrange(hidden_states, "b c h w -> b (h w) c") if is_map else hidden_states

        def split_heads(projected):  # (B, N, C) -> (B, heads, N, C / heads)
            return einops.rearrange(projected, "b n (heads d) -> b heads n d", heads=attn.heads)

        q, k = attn.to_q(x), attn.to_k(encoder_hidden_states)
        if attn.norm_q is not None:  # some bases normalize queries and keys, over all heads
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (split_heads(p) for p in (q, k, attn.to_v(encoder_hidden_states)))
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, k.shape[2], n_images)
            mask = einops.rearrange(mask, "(b heads) n m -> b heads n m", heads=attn.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        if self.adapter.user_condition is not None:
            tokens, scale = self.adapter.user_condition
            # K' and V', cast because the adapter is float32 and the base may not be
            user_k = split_heads(self.to_k(tokens)).to(q.dtype)
            user_v = split_heads(self.to_v(tokens)).to(q.dtype)
            r = n_images // len(tokens)  # one user for both images of a pair, or halves of guidance
            user_k, user_v = user_k.repeat(r, 1, 1, 1), user_v.repeat(r, 1, 1, 1)
            out = out + scale * F.scaled_dot_product_attention(q, user_k, user_v)

        out = attn.to_out[0](einops.rearrange(out, "b heads n d -> b n (heads d)"))
        out = attn.to_out[1](out)  # dropout: off, the base stays in eval mode
        if is_map:
            out = einops.rearrange(out, "b (h w) c -> b c h w", h=hidden_states.shape[2])
        return out


# -------------------------------------------------------------------- the loss (Eq. 1, 3, 6)
def denoising_error(pred, target):
    """||eps - eps_theta||^2 of Eq. 1, as the *mean* over latent elements, in at least float32.

    pred, target: (N, C, H, W), what the base predicted and what it should have: for Stage C the
    noise. Returns (N,).
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return (target.to(dtype) - pred.to(dtype)).square().mean(dim=(1, 2, 3))


def guard_scale(pred, target):
    """How much of the dispreferred images' gradient is taken, (B,) in [0, 1], so that a step does
    not raise the preferred images' errors: Diffusion-SDPO's safeguard,
    https://arxiv.org/abs/2511.03317.

    With residuals r = pred - target, a small step of size c along the loss' negative gradient asks
    the preferred images' predictions to move by -c r_w and the others' by +c s r_l, s being this
    scale. If both answer the weights alike, as images of one caption, noise and timestep nearly do,
    each moves by both: r_w by -c (r_w - s r_l), and its square does not grow if
    s <r_w, r_l> <= ||r_w||^2. So far as they do not answer alike, or other pairs of the batch or
    the optimizer turn the step, it dampens the growth without ruling it out.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    residual = (pred.detach().to(dtype) - target.to(dtype)).flatten(1)
    preferred, dispreferred = residual.chunk(2)
    product = (preferred * dispreferred).sum(1)
    safe = preferred.square().sum(1) / product.clamp(min=torch.finfo(dtype).tiny)
    return torch.where(product > 0, safe.clamp(max=1.0), 1.0)


def ppd_loss(pred, pred_ref, target, beta, T=1000, guard=False):
    """Eq. 6 for B pairs, omega being 1: -log sigmoid(-beta T Delta), where Delta is how much more
    the error fell below the reference's on the dispreferred image than on the preferred one. With
    one constant user for everybody it is Eq. 3, Diffusion-DPO:
    https://github.com/SalesforceAIResearch/DiffusionDPO/blob/main/train.py.

    pred: (2B, C, H, W), the policy's prediction eps_theta(x_t, c, u, t): the B preferred images
        first, then the B dispreferred ones in the same order
    pred_ref: (2B, C, H, W), the reference's, eps_ref(x_t, c, t), without gradient
    target: (2B, C, H, W), the noise that was added, or the velocity
    beta: strength of the KL constraint. The paper's norm is a sum, ours a mean: with the mean and
        T = 1000, beta = 1 is beta_dpo = 2000 of Diffusion-DPO's code, which takes half of it
    guard: scale the dispreferred images' gradients by guard_scale; the loss stays what it is

    Returns the losses (B,), not yet averaged, and (B,) tensors without gradient to log: the errors
    of Eq. 1, `logits` = -beta T Delta, and `implicit_accuracy`, in which a tie counts half (at step
    0 every pair is one).
    """
    mse = denoising_error(pred, target)
    mse_ref = denoising_error(pred_ref, target)
    mse_preferred, mse_dispreferred = mse.chunk(2)
    mse_ref_preferred, mse_ref_dispreferred = mse_ref.chunk(2)
    if guard:
        scale = guard_scale(pred, target)
        mse_dispreferred = torch.lerp(mse_dispreferred.detach(), mse_dispreferred, scale)
    delta = (mse_preferred - mse_ref_preferred) - (mse_dispreferred - mse_ref_dispreferred)
    logits = -beta * T * delta
    losses = -F.logsigmoid(logits)
    log = dict(
        implicit_accuracy=(logits > 0).to(mse.dtype) + 0.5 * (logits == 0).to(mse.dtype),
        logits=logits.detach(),
        error_preferred=mse_preferred.detach(),
        error_dispreferred=mse_dispreferred.detach(),
        error_ref_preferred=mse_ref_preferred.detach(),
        error_ref_dispreferred=mse_ref_dispreferred.detach(),
    )
    return losses, log
