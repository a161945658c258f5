"""Kernels, in Triton's interpreter against a float64 reference, and the cache of their configs."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "a split drops its tail",
        "qlab_kernels/tile.py",
        "product",
        "tl.range(first, K // BK, step, num_stages=STAGES)",
        "tl.range(first, K // BK // step * step, step, num_stages=STAGES)",
        "kernels/interpreter",
    ),
    Mutant(
        "nibbles swapped",
        "qlab_kernels/tile.py",
        "codes",
        """\
low = (words & 15).to(tl.int8)
high = (words >> 4).to(tl.int8)
""",
        """\
high = (words & 15).to(tl.int8)
low = (words >> 4).to(tl.int8)
""",
        "kernels/interpreter",
    ),
    Mutant(
        "a tile wider than a group takes its first scale",
        "qlab_kernels/tile.py",
        "product",
        "rows = tile * GROUPS + tl.arange(0, GROUPS)[None, :]",
        "rows = tile * GROUPS + 0 * tl.arange(0, GROUPS)[None, :]",
        "kernels/interpreter",
    ),
    Mutant(
        "a group wider than a tile moves on with it",
        "qlab_kernels/tile.py",
        "product",
        "row = tile // (GROUP // BK)",
        "row = tile",
        "kernels/interpreter",
    ),
    Mutant(
        "zero points added",
        "qlab_kernels/tile.py",
        "product",
        "w -= load_halves(zeros_ptr, row, rn, N_PAD, DTYPE).to(COMPUTE)[:, None]",
        "w += load_halves(zeros_ptr, row, rn, N_PAD, DTYPE).to(COMPUTE)[:, None]",
        "kernels/interpreter",
    ),
    Mutant(
        "whole rows lose their zero point",
        "qlab_kernels/tile.py",
        "product",
        "tl.dot(w - z if ZEROS else w, x, acc)",
        "tl.dot(w, x, acc)",
        "kernels/interpreter",
    ),
    Mutant(
        "partial sums in 16 bits",
        "qlab_kernels/int4_mm.py",
        "int4_mm",
        "x.new_empty(split, m, packed.n, dtype=torch.float32)",
        "x.new_empty(split, m, packed.n, dtype=stored(x.dtype))",
        "kernels/interpreter",
    ),
    Mutant(
        "experts read from the first one's words",
        "qlab_kernels/grouped.py",
        "int4_grouped_mm_kernel",
        "words_ptr += expert.to(tl.int64) * N_PAD * (K // 2) + block_n.to(tl.int64) * BN * (K // "
        "2)",
        "words_ptr += block_n.to(tl.int64) * BN * (K // 2)",
        "kernels/interpreter",
    ),
    Mutant(
        "experts end where the next begins",
        "qlab_kernels/grouped.py",
        "int4_grouped_mm_kernel",
        "tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)",
        "tl.load(offsets_ptr + e, mask=(e > 0) & (e < E), other=0)",
        "kernels/interpreter",
    ),
    Mutant(
        "planes of x unscaled",
        "qlab_kernels/fma.py",
        "planes",
        "by_word / powers",
        "by_word",
        "kernels/interpreter",
    ),
    Mutant(
        "dequantized rows shifted by an atom",
        "qlab_kernels/dequantize.py",
        "dequantize_kernel",
        "row = tl.minimum(row, (K_PAD // GROUP if GROUP > 0 else 1) - 1)",
        "row = 0 * tl.minimum(row, (K_PAD // GROUP if GROUP > 0 else 1) - 1)",
        "kernels/interpreter",
    ),
    Mutant(
        "padding holds weights",
        "qlab_kernels/layout.py",
        "pack",
        "torch.full((*codes.shape[:-2], n_pad, k_pad), 8, dtype=torch.uint8, device=codes.device)",
        "torch.full((*codes.shape[:-2], n_pad, k_pad), 9, dtype=torch.uint8, device=codes.device)",
        "kernels/layout kernels/interpreter",
    ),
    Mutant(
        "atoms in another order",
        "qlab_kernels/layout.py",
        "in_words",
        "q.reshape(-1, n, 4, 2, 8, k, 4, 2, 4, 2).permute(0, 1, 5, 2, 4, 8, 6, 7, 3, 9)",
        "q.reshape(-1, n, 4, 2, 8, k, 4, 2, 4, 2).permute(0, 1, 5, 2, 4, 8, 7, 6, 3, 9)",
        "kernels/layout",
    ),
    Mutant(
        "tiles that do not divide are legal",
        "qlab_kernels/families/int4_legal.py",
        "_legal_division",
        "if n_pad % c.bn or k_pad % c.bk: ...",
        "if False: ...",
        "kernels/capability cache/cache cache/tune kernels/interpreter",
    ),
    Mutant(
        "another device's entries count as the user's own",
        "qlab_kernels/cache.py",
        "Snapshot._search",
        "('user', self.user, True)",
        "('user', self.user, False)",
        "cache/cache",
    ),
    Mutant(
        "shipped before the user's own",
        "qlab_kernels/cache.py",
        "Snapshot._search",
        """\
(
    ("override", self.override, False),
    ("user", self.user, True),
    ("shipped-device", self.shipped, True),
    ("shipped-capability", self.shipped, False),
)
""",
        """\
(
    ("override", self.override, False),
    ("shipped-device", self.shipped, True),
    ("user", self.user, True),
    ("shipped-device", self.shipped, True),
    ("shipped-capability", self.shipped, False),
)
""",
        "cache/cache",
    ),
    Mutant(
        "illegal entries count",
        "qlab_kernels/cache.py",
        "Snapshot._search",
        "if legal(p, entry.config) is None: ...",
        "if True: ...",
        "cache/cache",
    ),
    Mutant(
        "the hash forgets the user's files",
        "qlab_kernels/cache.py",
        "Snapshot.hash",
        "for layer in (self.override, self.user, self.shipped): ...",
        "for layer in (self.override, self.shipped): ...",
        "cache/cache",
    ),
    Mutant(
        "writers do not lock",
        "qlab_kernels/entries.py",
        "locked",
        "fcntl.flock(sidecar, fcntl.LOCK_EX)",
        "pass",
        "cache/entries",
    ),
    Mutant(
        "a writer forgets what was there",
        "qlab_kernels/entries.py",
        "update",
        "entries = dict(table.entries) if table else {}",
        "entries = {}",
        "cache/entries cache/cache",
    ),
    Mutant(
        "a corrupt file is lost",
        "qlab_kernels/entries.py",
        "_read_locked",
        "os.replace(path, aside)",
        "path.unlink()",
        "cache/entries cache/cache",
    ),
    Mutant(
        "an older entry wins an import",
        "qlab_kernels/transfer.py",
        "import_.merge",
        "entries[key].date <= entry.date",
        "entries[key].date >= entry.date",
        "cache/commands cache/cache",
    ),
]
