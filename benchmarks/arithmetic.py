"""The arithmetic that the map needs, counted by loops that can be read: matrix products alone, two per multiply-add.

After the clean state has been put at position `at` of block `layer`'s output, this and nothing else can change:

- in the next block, keys and values at `at`; in later blocks, keys and values at `at` and behind it;
- in every later block, queries, attention's output and the MLP at `at` and behind it, each query looking at all keys
  up to its own; in the last block at the last position alone, because nothing else is read;
- the logits of the last position.

Before that, the two base runs: every block at every position and one row of logits each.
"""

from benchmarks.task import Shape


def needed(shape: Shape) -> int:
    """Floating-point operations of the whole map."""
    return 2 * base_run(shape) + sum(patched_run(shape, layer, at) for layer, at in shape.patches)


def base_run(shape: Shape) -> int:
    everything = range(shape.n_pos)
    return shape.n_layers * block(shape, everything, everything) + unembedding(shape)


def patched_run(shape: Shape, layer: int, at: int) -> int:
    last = shape.n_pos - 1
    if layer == shape.n_layers - 1 and at != last:
        return 0  # nothing that is read has changed
    total, changed = unembedding(shape), range(at, at + 1)
    for later in range(layer + 1, shape.n_layers):
        behind = range(at, shape.n_pos)
        queries = range(last, shape.n_pos) if later == shape.n_layers - 1 else behind
        total += block(shape, changed, queries)
        changed = behind
    return total


def block(shape: Shape, keys: range, queries: range) -> int:
    """One block: keys and values are made at `keys`; everything else is computed at `queries`."""
    d_model = shape.d_model
    keys_values = 2 * d_model * d_model * len(keys)
    queries_output = 2 * d_model * d_model * len(queries)
    mlp = 3 * d_model * shape.d_mlp * len(queries)
    attention = sum(2 * d_model * (query + 1) for query in queries)  # scores, and the weighted sum of values
    return 2 * (keys_values + queries_output + mlp + attention)


def unembedding(shape: Shape) -> int:
    return 2 * shape.d_model * shape.d_vocab
