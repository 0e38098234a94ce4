"""Recipes: what is accepted, and how each mistake is named."""

import pytest
import yaml

from leafkern.errors import InputError
from leafkern.train.recipe import Recipe, changed_keys, load_recipe, save_recipe

SMALL = {
    "teacher": {"model": "some/teacher"},
    "student": {"layers": [0, 2, 5]},
    "data": {"documents": "documents.jsonl"},
}


def with_values(**changes):
    values = {key: dict(value) for key, value in SMALL.items()}
    for place, value in changes.items():
        *sections, key = place.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return values


def test_defaults_are_leafs():
    recipe = load_recipe(SMALL)
    assert recipe.batch_size == 32
    assert recipe.loss == "l2sq"
    assert (recipe.optimiser.lr, recipe.optimiser.final_lr) == (1e-4, 1e-5)
    assert (recipe.schedule.cycles, recipe.schedule.epochs_per_cycle) == (3, 10)
    assert recipe.student.head == "dense"
    assert recipe.student.dropout == 0
    assert recipe.data.documents == ["documents.jsonl"]


def test_docstring_recipe_is_valid():
    import leafkern.train.recipe as module

    example = module.__doc__.split("::", 1)[1]
    recipe = load_recipe(yaml.safe_load(example))
    assert recipe.student.head_init == "lstsq"
    assert recipe.teacher.prompts.queries.startswith("Represent")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"studnet": {}}, ["'studnet'", "'student'"]),
        ({"optimiser__learning_rate": 1}, ["optimiser.learning_rate", "valid:", "lr"]),
        ({"teacher__prompts__query": "x"}, ["teacher.prompts.query", "'queries'"]),
        ({"teacher__vectors__document": "x"}, ["teacher.vectors.document", "'documents'"]),
        ({"optimiser__lr": -1}, ["optimiser.lr", "-1", "greater than 0"]),
        ({"optimiser__lr": "fast"}, ["optimiser.lr", "'fast'", "number"]),
        ({"optimiser__betas": [0.9]}, ["optimiser.betas"]),
        ({"batch_size": 0}, ["batch_size", "greater than or equal to 1"]),
        ({"loss": "l3"}, ["loss", "'l3'", "'l2sq'"]),
        ({"student__head": "linear"}, ["student.head", "'linear'", "'dense'"]),
        ({"student__layers": []}, ["student.layers"]),
        ({"student": {}}, ["student", "model", "layers"]),
        ({"data": {}}, ["data", "documents", "queries"]),
        ({"teacher": {}}, ["teacher", "exactly one of model, vectors, callable", "none"]),
        ({"teacher__callable": "a:b", "teacher__id": "1"}, ["exactly one", "model and callable"]),
        ({"teacher": {"callable": "a.b:c"}}, ["callable", "`id`"]),
        ({"teacher": {"callable": "a.b:c", "id": " "}}, ["callable", "`id`"]),
        ({"teacher": {"callable": "a.b.c", "id": "1"}}, ["package.module:function", "'a.b.c'"]),
        ({"teacher": {"callable": "a.b:c", "id": "1"}}, ["student.layers", "student.model"]),
        ({"schedule": {"epochs": 1, "steps": 5}}, ["schedule", "epochs and steps"]),
        ({"student__head": "none", "student__head_init": "lstsq"}, ["student", "head: dense"]),
    ],
)
def test_mistakes_are_named(changes, parts):
    with pytest.raises(InputError) as caught:
        load_recipe(with_values(**changes))
    for part in parts:
        assert part in str(caught.value)


def test_missing_section():
    with pytest.raises(InputError, match="recipe: teacher is missing"):
        load_recipe({"student": {"model": "x"}, "data": {"documents": "d"}})


def test_overrides():
    recipe = load_recipe(
        SMALL, ["optimiser.lr=3e-5", "student.layers=[1, 3]", "schedule.steps=7", "teacher.prompts.queries='q: '"]
    )
    assert recipe.optimiser.lr == 3e-5
    assert recipe.student.layers == [1, 3]
    assert recipe.schedule.steps == 7
    assert recipe.schedule.epochs_per_cycle is None
    assert load_recipe(load_recipe(SMALL), ["schedule.steps=7"]).schedule.steps == 7
    assert recipe.teacher.prompts.queries == "q: "
    assert SMALL["student"]["layers"] == [0, 2, 5]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimiser.lr", ["a.b=value"]),
        ("=3", ["a.b=value"]),
        ("optimizer.lr=1", ["'optimizer'", "'optimiser'"]),
        ("optimiser.rl=1", ["optimiser.rl", "'lr'"]),
        ("teacher.model.name=x", ["teacher.model holds a value"]),
        ("seed=[1", ["not YAML"]),
    ],
)
def test_bad_overrides(override, parts):
    with pytest.raises(InputError) as caught:
        load_recipe(SMALL, [override])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"teacher: [1\nstudent", ["recipe.yaml:", "not YAML"]),
        (b"- a\n", ["expected a mapping"]),
        (b"", ["expected a mapping"]),
        (b"teacher: \xff\xfe", ["not UTF-8"]),
        (b"!!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_bad_files(tmp_path, content, parts):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    for part in parts:
        assert part in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_recipe(tmp_path / "none.yaml")


def test_saved_recipe_reads_back(tmp_path):
    recipe = load_recipe(with_values(teacher__prompts={"queries": "Frage: ä"}, schedule={"minutes": 2}))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert isinstance(again, Recipe)
    assert changed_keys(recipe, again) == []


def test_changed_keys_names_what_a_resume_must_keep():
    old = load_recipe(SMALL)
    new = load_recipe(SMALL, ["optimiser.lr=1e-3", "threads=1", "checkpoint.keep=9", "teacher.cache=x"])
    assert changed_keys(old, new) == ["optimiser.lr: 0.0001 -> 0.001"]
