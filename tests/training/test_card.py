"""What a model card says of bad records, from reports as runs leave them."""

import json

from casa.training.run import count_bad


def test_reports_of_all_readers_are_added_up(tmp_path):
    def line(origin, reason, why="so"):
        return json.dumps({"origin": origin, "reason": reason, "why": why}, ensure_ascii=False) + "\n"

    first = line("a:1", "not-json") + line("a:2", "wrong-type", "A value is 'x\u2028y'.")
    (tmp_path / "bad-records-0-0.jsonl").write_text(first, encoding="utf-8")
    # the process was killed while it wrote the second line
    (tmp_path / "bad-records-1-0.jsonl").write_text(line("a:3", "not-json") + '{"origin": "a:4"', encoding="utf-8")
    assert count_bad(tmp_path) == {"not-json": 2, "wrong-type": 1}
    # in the next epoch, another reader met what the first had met before
    with (tmp_path / "bad-records-1-0.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + first)
    assert count_bad(tmp_path) == {"not-json": 2, "wrong-type": 1}
