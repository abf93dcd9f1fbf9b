"""Megalodon in plain float64 numpy, one token after the other: the equations of arXiv 2404.08801 as
the released code has them, of the paper's Eq. 2, and of Mega's moving average and gate."""

import numpy as np

from blt_jax.models.megalodon_config import EmaKind, GateKind, NormKind, ResidualKind


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def unit_rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def token_norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * (weight + 1) + bias


class TimestepNorm:
    """Eq. 4: every group by the mean and variance of all its numbers in all tokens so far."""

    def __init__(self, w, name, config):
        self.weight, self.bias, self.eps = w[f"{name}_weight"], w[f"{name}_bias"], config.norm_eps
        self.n, self.mean, self.variance = config.prior_count, 0.0, 0.0
        self.groups, self.kind = config.norm_groups, config.norm
        if config.prior_count:
            self.mean = w[f"{name}_prior_mean"]
            self.variance = np.exp(w[f"{name}_prior_log_variance"])

    def __call__(self, x):
        if self.kind is NormKind.LAYER:
            return token_norm(x, self.weight, self.bias, self.eps)
        x = x.reshape(self.groups, -1)
        self.n, n = self.n + 1, self.n + 1
        delta = x.mean(1) - self.mean
        self.mean = self.mean + delta / n
        within = x.var(1) + delta**2 * (n - 1) / n
        self.variance = ((n - 1) * self.variance + within) / n
        y = (x - self.mean[:, None]) / np.sqrt(self.variance + self.eps)[:, None]
        return y.reshape(-1) * (self.weight + 1) + self.bias


class MovingAverage:
    """h = q h + p x, y = Re(g h) + omega x; Eq. 2 of the paper turns p by the angle of q too."""

    def __init__(self, w, config):
        alpha, delta = sigmoid(w["ema_alpha"]), sigmoid(w["ema_delta"])
        D, N = alpha.shape
        self.h, self.q = np.zeros((D, N), complex), 1 - alpha * delta
        if config.ema is EmaKind.REAL:
            self.p, self.g, self.omega = alpha * w["ema_beta"], w["ema_eta"], np.zeros(D)
            return
        k = np.arange(1, N + 1)
        turn = np.exp(1j * k * (2 * np.pi / N) * sigmoid(w["ema_theta"])[:, None])
        self.q = self.q * turn
        self.p = alpha * turn if config.input_phase else alpha
        self.g = (w["ema_gamma_re"] + 1j * w["ema_gamma_im"]) / np.sqrt(N)
        self.omega = w["ema_omega"]

    def __call__(self, x):
        self.h = self.q * self.h + self.p * x[:, None]
        return (self.g * self.h).real.sum(1) + self.omega * x


def rotated(x, position, base):
    """Rotary embedding of x [H, K]; features 2i and 2i + 1 are one complex number."""
    K = x.shape[-1]
    angle = position * base ** (-2 * np.arange(K // 2) / K)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


class Block:
    """A layer and what it knows of the tokens before."""

    def __init__(self, w, config):
        self.w, self.config, self.kept = w, config, []
        self.norm = TimestepNorm(w, "norm", config)
        none = config.ema is EmaKind.NONE
        self.average = (lambda x: x) if none else MovingAverage(w, config)

    def attention(self, q, k, v, t):
        """Scores are not scaled; a chunk, or a window's last tokens."""
        c, window, base = (
            self.config.chunk_size,
            self.config.attention_window,
            self.config.rope.theta,
        )
        if t % c == 0 and not window:
            self.kept = []
        position = t if window else t % c
        self.kept = [*self.kept, (rotated(k, position, base), v)][-window:]
        keys, values = (np.stack(x) for x in zip(*self.kept, strict=True))
        scores = np.einsum("hk,shk->hs", rotated(q, position, base), keys)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.einsum("hs,shj->hj", weights / weights.sum(1, keepdims=True), values)

    def __call__(self, x, t):
        w, eps = self.w, self.config.norm_eps

        def heads(x, name):
            return np.einsum("d,dhk->hk", x, w[f"{name}_kernel"]) + w[f"{name}_bias"]

        x_tn = self.norm(x)
        mx = unit_rms(self.average(x_tn), eps) * (w["ema_norm_weight"] + 1)
        z = unit_rms(heads(mx, "z"), eps)
        z_h = z.shape[-1]
        q, k = z * (w["qk_gain"] + 1) / np.sqrt(z_h) + w["qk_offset"]
        seen = self.attention(q, k, silu(heads(x_tn, "value")), t)
        seen = seen * silu(heads(mx, "gate"))
        h = mx @ w["hidden_kernel"] + w["hidden_bias"]
        h = h + np.einsum("hj,hjd->d", seen, w["out_kernel"])
        y = x + h
        if self.config.gate is GateKind.MEGA:
            phi = sigmoid(mx @ w["update_kernel"] + w["update_bias"])
            y = phi * silu(h) + (1 - phi) * x
        two_hop = self.config.residual is ResidualKind.TWO_HOP
        stream = x if two_hop else y
        y = token_norm(y, w["mlp_norm_weight"], w["mlp_norm_bias"], eps)
        h = silu(y @ w["mlp_gate"])
        if self.config.swiglu:
            h = h * (y @ w["mlp_up"])
        h = h @ w["mlp_down"]
        if self.config.rescale_mlp:
            h = h * w["mlp_scale"]
        return stream + h


class Model:
    """A model that has read nothing; params as float64."""

    def __init__(self, config, params):
        self.config, self.params = config, params
        self.blocks = [
            Block({name: x[i] for name, x in params["layers"].items()}, config)
            for i in range(config.num_layers)
        ]
        self.norm, self.read = TimestepNorm(params, "norm", config), 0

    def __call__(self, token):
        """The logits [V] after one more token."""
        config, params = self.config, self.params
        table = params["embed"]["table"]
        x = table[token] * (np.sqrt(config.d_model) if config.scale_embeddings else 1)
        for block in self.blocks:
            x = block(x, self.read)
        self.read += 1
        head = table.T if config.tied_embeddings else params["head"]["kernel"]
        return self.norm(x) @ head


def logits(config, params, tokens):
    """[T, V] of one document [T]; params: a model's, as float64."""
    model = Model(config, params)
    return np.stack([model(token) for token in tokens])


def truncated_logits(config, params, tokens, chunks):
    """`logits` of a stream whose norms, after every second chunk from the `chunks`th on, know the
    last `chunks` - 2 chunks as another model that has read nothing else knows them."""
    model, rows, chunk = Model(config, params), [], config.chunk_size
    for end, token in enumerate(tokens, start=1):
        rows.append(model(token))
        if end % (2 * chunk) == 0 and end >= chunks * chunk:
            other = Model(config, params)
            for known in tokens[end - (chunks - 2) * chunk : end]:
                other(known)
            for mine, its in zip(model.blocks, other.blocks, strict=True):
                mine.norm = its.norm
            model.norm = other.norm
    return np.stack(rows)


def group_norm(x, weight, bias, groups, eps):
    """Over all tokens [T, D] and the features of each group."""
    rows = x.reshape(len(x), groups, -1)
    mean, variance = rows.mean((0, 2), keepdims=True), rows.var((0, 2), keepdims=True)
    return ((rows - mean) / np.sqrt(variance + eps)).reshape(x.shape) * (weight + 1) + bias


def class_logits(config, params, tokens):
    """Section 4.4, [classes] of one row: averages in both directions, attention within chunks in
    both directions, group norms, the mean over tokens."""
    x, places, eps = params["embed"]["table"][tokens], np.arange(len(tokens)), config.norm_eps
    chunk = places // config.chunk_size
    for layer in range(config.num_layers):
        w = {name: leaf[layer] for name, leaf in params["layers"].items()}
        back = {k.removeprefix("backward_"): v for k, v in w.items() if k.startswith("backward_")}
        back["ema_omega"] = np.zeros(config.d_model)  # what a token sees of itself counts once
        normal = group_norm(x, w["norm_weight"], w["norm_bias"], config.norm_groups, eps)
        ahead, behind = MovingAverage(w, config), MovingAverage(back, config)
        average = np.stack([ahead(token) for token in normal])
        average += np.stack([behind(token) for token in normal[::-1]])[::-1]
        mixed = unit_rms(average, eps) * (w["ema_norm_weight"] + 1)

        def heads(x, name, w=w):
            return np.einsum("td,dhk->thk", x, w[f"{name}_kernel"]) + w[f"{name}_bias"]

        shared = unit_rms(heads(mixed, "z"), eps)
        gain = (w["qk_gain"] + 1) / np.sqrt(shared.shape[-1])
        q, k = (shared * gain[i] + w["qk_offset"][i] for i in (0, 1))
        theta, size = config.rope.theta, config.chunk_size
        q, k = (np.stack([rotated(each[t], t % size, theta) for t in places]) for each in (q, k))
        scores = np.einsum("thk,shk->hts", q, k)
        weights = np.exp(scores - scores.max()) * (chunk[:, None] == chunk[None])
        weights /= weights.sum(-1, keepdims=True)
        found = np.einsum("hts,shj->thj", weights, silu(heads(normal, "value")))
        found *= silu(heads(mixed, "gate"))
        y = x + mixed @ w["hidden_kernel"] + w["hidden_bias"]
        y += np.einsum("thj,hjd->td", found, w["out_kernel"])
        h = np.stack([token_norm(row, w["mlp_norm_weight"], w["mlp_norm_bias"], eps) for row in y])
        x = x + (silu(h @ w["mlp_gate"]) * (h @ w["mlp_up"])) @ w["mlp_down"]
    x = group_norm(x, params["norm_weight"], params["norm_bias"], config.norm_groups, eps)
    return x.mean(0) @ params["head"]["kernel"]
