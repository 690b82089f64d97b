from dualstream.benchmarks import micro
from dualstream.measuring import Clock


def test_every_operation_at_every_size():
    rows = micro.run(2, Clock())
    by_key = {(row["way"], row["visual_tokens"], row["batch"]): row for row in rows}
    ways = {"plan, rle", "plan, rle_drop_top2", "pool, mean", "rewrite"}
    assert set(by_key) == {(way, size * batch, batch) for way in ways for size in (576, 1280) for batch in (1, 8)}
    # No loop over pictures or tokens anywhere: what grows is the size of operations, never their number.
    for way in ways:
        operations = {key[1:]: row["operations"] for key, row in by_key.items() if key[0] == way}
        assert operations[576 * 8, 8] <= operations[576, 1] and operations[576, 1] == operations[1280, 1]
        assert len({row["waits"] for row in rows if row["way"] == way}) == 1
