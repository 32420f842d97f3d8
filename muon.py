"""Muon, an optimizer for the matrices and convolution kernels inside a network. Needs torch alone.

    matrices = [p for p in model.encoder.parameters() if p.ndim == 2]  # AdamW takes all the rest
    muon = Muon(matrices, lr=0.005, momentum=0.9, weight_decay=0.01)

From leaf to root: orthogonalise and orthogonal_updates, the arithmetic; capture_graph, which makes all of it one launch
on a GPU; and Muon. After four epochs the tiny ViT is 14 points better with it than with AdamW (README, "What the runs
say").
"""

import gc
from functools import partial

import torch


def orthogonalise(matrices, dtype=torch.float32):
    """Roughly U V^T for each matrix U S V^T (singular values S): the nearest one whose singular values are all 1.

    matrices float (n, O, I) -> the same shape, in `dtype`. Five steps of a Newton-Schulz iteration, an odd polynomial
    of the matrix, which leaves U and V alone: singular values between 0.002 and 1 end between 0.68 and 1.21. It needs
    only matrix products, for which bf16 is precise enough.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # (n, R, L), R <= L: the products x x^T are the smaller ones
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT  # (n, R, R)
        # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x  # (n, O, I)


def orthogonal_updates(tensors, dtype=torch.float32):
    """Replace each tensor by the orthogonal matrix near it, scaled to AdamW's step size. Builds on orthogonalise.

    tensors: float32 matrices (O, I) and kernels (O, C, k, k), which count as matrices (O, C*k*k), as a list; changed in
    place. `dtype` is that of the products.
    """
    alike = {}  # by shape: all of a shape go through each product together, in one launch on a GPU
    for tensor in tensors:
        alike.setdefault(tensor.shape, []).append(tensor)
    for same in alike.values():
        matrices = orthogonalise(torch.stack(same).flatten(2), dtype)  # (n, O, C*k*k)
        # An orthogonal matrix's entries have an RMS of 1 / sqrt(the longer side), those of AdamW's step 0.2.
        matrices = matrices.float() * (0.2 * max(matrices.shape[1:]) ** 0.5)
        for tensor, matrix in zip(same, matrices):
            tensor.copy_(matrix.reshape(tensor.shape))  # (O, I) or (O, C, k, k)


def capture_graph(function):
    """Capture a CUDA function without arguments as one CUDA graph. Returns a function that replays it.

    To launch hundreds of small operations one by one takes the host longer than the GPU needs for them: with Muon's as
    a graph an H200 trains the base hybrid 1.6 times as fast, ResNet-18 1.9 times. The function is called twice here. It
    must read and write the same tensors each time, which the caller keeps, and its Python numbers are captured as they
    are now: a learning rate belongs outside.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # its first call may set up what cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # what is collected during the capture, such as an old graph, would break it
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps one workspace for each stream, and torch captures all graphs on one stream. So the old ones are
    # cleared, and this graph gets a stream of its own: cuBLAS then allocates a workspace in this graph's memory, where
    # no other graph writes. "thread_local" lets other threads, such as NCCL's, use CUDA meanwhile.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        function()
    return graph.replay


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A gradient is dominated by a few directions. Made orthogonal, it moves along all directions at the same speed. For
    matrices and convolution kernels alone: a kernel (O, C, k, k) counts as the matrix (O, C*k*k) that multiplies a
    patch. The step is scaled to the size that AdamW's would have (Liu et al. 2025, 2502.16982), and weights decay as in
    AdamW. `dtype` is that of the products. torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the same in bf16,
    one matrix after another, and takes no kernels. Where bf16 is emulated, as on CPUs without AVX512-BF16 or AMX, that
    takes longer than all the rest of a training step. Builds on orthogonal_updates and, with CUDA, capture_graph.
    ValueError for a parameter with fewer than two dimensions, and in a step for one without a gradient.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        self.dtype = dtype
        self.work = []  # for each group the tensors of its updates, and the function that makes them orthogonal
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def add_param_group(self, param_group):  # torch's __init__ calls it for each group as well
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if any(p.ndim < 2 for p in params):
            self.param_groups.pop()
            raise ValueError("Muon is for matrices and kernels: biases, norms and the like are for AdamW")
        updates = [torch.zeros_like(p) for p in params]
        make_orthogonal = partial(orthogonal_updates, updates, self.dtype)
        self.work.append((updates, capture_graph(make_orthogonal) if updates[0].is_cuda else make_orthogonal))

    @torch.no_grad()
    def step(self):
        for group, (updates, make_orthogonal) in zip(self.param_groups, self.work, strict=True):
            params, beta = group["params"], group["momentum"]
            if any(p.grad is None for p in params):
                raise ValueError("a parameter has no gradient: give Muon only what is trained")
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            # foreach: one launch for a list of tensors, if the memory layouts of all agree.
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            torch._foreach_copy_(updates, grads)
            torch._foreach_lerp_(updates, momenta, beta)  # Nesterov's: a look ahead
            make_orthogonal()
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
