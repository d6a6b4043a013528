"""Makes `combinations.txt`, the covering array of the crosscheck's cases.

Run it after a change of the factors or the rules in `factors.py`:

    pip install --constraint constraints/py311.txt covertable
    python packages/crosscheck/tools/combine.py

covertable (Apache 2.0, pure Python) looks for the rows, the same ones each time; they are written in the
order in which each adds most pairs, so that the first few are the best few.
"""

from pathlib import Path

from covertable.main import Controller

from heedful_crosscheck import combinations
from heedful_crosscheck.combinations import pairs_of
from heedful_crosscheck.factors import FACTORS, RULES, TRIPLES, VIEWS, Choice

TABLE = Path(combinations.__file__).with_suffix(".txt")


def main() -> None:
    """Writes the table."""
    everything = {name: _without_views(name) for name in FACTORS}
    rows = _cover(everything, [{"fields": list(names), "strength": 3} for names in TRIPLES])
    for name, views in VIEWS.items():
        # With one factor alone there are no pairs but those of the sub-models: of the view and the rest.
        beside = {n: list(views) if n == name else everything[n] for n in FACTORS}
        rows += _cover(
            beside, [{"fields": [name, n], "strength": 2} for n in FACTORS if n != name], 1
        )
    ordered = _best_first(rows)
    TABLE.write_text("".join(f"{combinations.written(row)}\n" for row in ordered))
    print(f"{len(rows)} rows, {combinations.pairs(rows)} pairs: {TABLE}")


def _without_views(name: str) -> list[str]:
    return [value for value in FACTORS[name] if value not in VIEWS.get(name, ())]


def _cover(factors: dict[str, list[str]], stronger: list[dict], strength: int = 2) -> list[dict]:
    constraints = [
        {
            "operator": "or",
            "conditions": [
                {"operator": "not", "condition": _any_of(rule.where)},
                _any_of(rule.must),
            ],
        }
        for rule in RULES
    ]
    search = Controller(factors, strength=strength, sub_models=stronger, constraints=constraints)
    rows = search.make()
    assert not search.stats["uncovered_pairs"]
    return rows


def _any_of(choice: Choice) -> dict:
    conditions = [{"operator": "in", "left": name, "values": list(v)} for name, v in choice.items()]
    return {"operator": "or", "conditions": conditions}


def _best_first(rows: list[dict]) -> list[dict]:
    rest, seen, ordered = list(rows), set(), []
    while rest:
        best = max(rest, key=lambda row: sum(together not in seen for together in pairs_of(row)))
        rest.remove(best)
        ordered.append(best)
        seen.update(pairs_of(best))
    return ordered


if __name__ == "__main__":
    main()
