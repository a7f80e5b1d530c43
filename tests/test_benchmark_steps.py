"""benchmark.py steps: step rules at equal CPU time, on few images."""

import json

from PIL import Image

from recipes import benchmark


def test_rules_take_turns_and_results_are_kept(tmp_path, capsys):
    for part, count in (("train", 14), ("test", 2)):
        for label, level in (("dark", 40), ("light", 160)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (level + 4 * i, level, level)).save(tmp_path / part / label / f"{i}.png")
    file = tmp_path / "steps.jsonl"
    argv = ["steps", "--dataset", f"imagefolder:{tmp_path}", "--img-size", "16", "--batch-size", "8", "--epochs", "4"]
    argv += ["--rules", "groups", "nasvit:4", "--count", "2", "--rounds", "1", "--seeds", "1", "--json", str(file)]
    benchmark.main(argv)
    first = capsys.readouterr().out
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    groups, nasvit = (record["rules"][name] for name in ("groups", "nasvit:4"))
    assert groups["epochs"] == 4 and 1 <= nasvit["epochs"] <= 4
    assert all(0 <= r[k] <= 1 for r in (groups, nasvit) for k in ("smallest", "random", "largest"))
    assert f"| nasvit:4 | {nasvit['epochs']} | {nasvit['seconds']:.0f} | {nasvit['smallest']:.4f} ± nan |" in first
    benchmark.main(argv)
    again = capsys.readouterr().out
    assert "seed 0" not in again and again.splitlines()[-2:] == first.splitlines()[-2:]
