"""CSV files against what was written to them, and each fault with its line and its column."""

import csv
import io
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxnn import Columns
from jaxnn.datasets import load_csv
from jaxnn.tables import MAX_CLASSES, check_columns

PETS = """weight,ears,species,age
4.5,6,dog,1.5
30,11.5,cat,2
-3.5e0, 5 ,dog,3

"1",2,"emu",7.25
"""
X = np.array([[4.5, 6, 1.5], [30, 11.5, 2], [-3.5, 5, 3], [1, 2, 7.25]])


@pytest.fixture
def load(tmp_path):
    """A function that writes text, or bytes, and loads it."""

    def written(text, **options):
        path = tmp_path / "pets.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_csv(path, **options)

    return written


def target(*labels):
    """A file of one feature, and of a target with these labels."""
    rows = [f"{row}.5,{label}" for row, label in enumerate(labels)]
    return "\n".join(["size,kind", *rows])


@pytest.mark.parametrize(
    "text",
    [
        PETS,
        PETS.replace("\n", "\r\n"),
        "\ufeff" + PETS,
        PETS.strip(),
        PETS.replace("ears", " ears").replace("cat", " cat "),
        PETS.replace("weight", '"weight"').replace("dog", '"dog"'),
    ],
)
def test_a_file_becomes_a_batch_with_the_meaning_of_its_columns(load, text):
    (x, y, _), columns = load(text, target="species")
    assert isinstance(x, jax.Array)
    assert isinstance(y, jax.Array)
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(x, X.astype(np.float32))
    np.testing.assert_array_equal(columns.class_names[np.asarray(y)], ["dog", "cat", "dog", "emu"])
    assert columns.class_names.tolist() == ["cat", "dog", "emu"]
    assert columns.feature_names == ("weight", "ears", "age")
    assert columns.mean is columns.std is None


def test_features_are_chosen_by_name_and_in_order(load):
    (x, y, _), columns = load(PETS, target=None, features=["age", "weight"])
    np.testing.assert_array_equal(x, X[:, [2, 0]].astype(np.float32))
    assert y is None
    assert columns.feature_names == ("age", "weight")
    assert columns.class_names is None


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_fields_may_be_separated_otherwise(load, mark):
    (x, _, _), _ = load(PETS.replace(",", mark), target="species", delimiter=mark)
    np.testing.assert_array_equal(x, X.astype(np.float32))


@pytest.mark.parametrize(
    ("labels", "kind", "names", "y"),
    [
        (("b", "a", "b"), None, ["a", "b"], [1, 0, 1]),
        (("10", "9", "-1"), None, ["-1", "9", "10"], [2, 1, 0]),
        (("10", "9", "-1"), "numbers", None, [[10], [9], [-1]]),
        (("1.5", "2", "0"), None, None, [[1.5], [2], [0]]),
        (("1.5", "11", "0"), "classes", ["0", "1.5", "11"], [1, 2, 0]),
        (("1", "2", "3+"), "classes", ["1", "2", "3+"], [0, 1, 2]),
        (("True", "False"), None, ["False", "True"], [1, 0]),
    ],
)
def test_words_and_whole_numbers_are_classes_unless_told_otherwise(load, labels, kind, names, y):
    (_, got, _), columns = load(target(*labels), target="kind", kind=kind)
    np.testing.assert_array_equal(got, y)
    assert got.dtype == (np.float32 if names is None else np.int32)
    assert (columns.class_names is None) == (names is None)
    assert names is None or columns.class_names.tolist() == names


def test_standardised_rows_have_mean_0_and_deviation_1_and_the_figures_are_kept(load):
    (x, _, _), columns = load(PETS, target="species", standardise=True)
    np.testing.assert_allclose(columns.mean, X.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(columns.std, X.std(axis=0), rtol=1e-15)
    np.testing.assert_allclose(x, (X - X.mean(axis=0)) / X.std(axis=0), rtol=1e-6, atol=1e-7)


def test_new_rows_get_the_columns_the_figures_and_the_classes_of_the_old(load):
    columns = load(PETS, target="species", standardise=True, features=["age", "ears"]).columns
    new = "species,ears,id,age\nemu,6,a7,1.5\ncat,11.5,b9,2\n"
    (x, y, _), same = load(new, target="species", columns=columns)
    expected = (X[:2][:, [2, 1]] - columns.mean) / columns.std
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_array_equal(y, [2, 0])
    for field, got, wanted in zip(Columns._fields, same, columns, strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=field)
    alone = load(new, target=None, columns=columns)
    np.testing.assert_array_equal(alone.batch.x, x)
    assert alone.batch.y is None
    assert alone.columns.class_names.tolist() == ["cat", "dog", "emu"]


def test_new_numbers_stay_numbers_although_they_are_whole(load):
    columns = load(target(1.5, 2.0), target="kind").columns
    (_, y, _), _ = load(target(1, 2), target="kind", columns=columns)
    np.testing.assert_array_equal(y, [[1], [2]])


def test_a_frame_is_read_as_the_file_it_would_write(load):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.StringIO(PETS))
    options = {"target": "species", "standardise": True}
    from_file, from_frame = load(PETS, **options), load_csv(frame, **options)
    for got, wanted in zip(from_frame.batch[:2], from_file.batch[:2], strict=True):
        np.testing.assert_array_equal(got, wanted)
    shuffled = load_csv(frame.iloc[::-1, ::-1], target="species", columns=from_frame.columns)
    np.testing.assert_array_equal(shuffled.batch.x, from_file.batch.x[::-1])
    frame.loc[1, "ears"] = np.nan
    with pytest.raises(ValueError, match="the frame, line 3, column 'ears'"):
        load_csv(frame, target="species")


def test_what_is_no_file_and_no_frame_is_refused_by_name():
    rows: Any = {"weight": [1, 2]}
    with pytest.raises(TypeError, match="path must name a file or be a frame; got a dict"):
        load_csv(rows, target=None)


FINITE = st.floats(-3e38, 3e38, allow_subnormal=False)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(NAMES.filter(bool), min_size=2, max_size=4, unique=True),
    st.lists(st.tuples(st.lists(FINITE, min_size=3, max_size=3), st.booleans()), min_size=1),
    st.sampled_from(",;\t"),
)
@example(["a,b", 'say "a"'], [([1e-3, 0.1, 2.0], True)], ",")
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, names, rows, mark):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=mark)
    width = len(names) - 1
    writer.writerow(names)
    for numbers, is_on in [*rows, ([0.5] * 3, True), ([0.5] * 3, False)]:
        writer.writerow([*map(repr, numbers[:width]), "on" if is_on else "off"])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    try:
        [float(name) for name in names]
    except ValueError:
        (x, y, _), columns = load_csv(path, target=names[-1], delimiter=mark)
        assert columns.feature_names == tuple(names[:-1])
        expected = np.array([numbers[:width] for numbers, _ in rows], np.float32)
        np.testing.assert_array_equal(np.asarray(x)[: len(rows)], expected)
        np.testing.assert_array_equal(np.asarray(y)[: len(rows)], [is_on for _, is_on in rows])


WORDS = target("a", "b", "a")
FAULTS = {
    "a word for a number": (
        PETS.replace("\n30", "\nheavy"),
        {},
        "line 3, column 'weight' must be a finite number of float32; got 'heavy': correct it, or "
        "choose other columns by features=[...]",
    ),
    "after a line that is blank": (PETS.replace("7.25", "x"), {}, "line 6, column 'age'"),
    "after a field of two lines": (
        'a,kind\n"1\n",x\n\nz,y',
        {"target": "kind"},
        "line 5, column 'a' must be",
    ),
    "missing, alone on its line": (
        'weight\n1\n""\n3\n',
        {"target": None},
        "line 3, column 'weight' must be",
    ),
    "a long delimiter": (PETS, {"delimiter": ";;"}, "delimiter must be one character"),
    "missing": (PETS.replace("11.5", ""), {}, "line 3, column 'ears' must be a finite number"),
    "what to do": (PETS.replace("11.5", "NaN"), {}, "got 'NaN': fill it in or remove the line"),
    "infinite": (PETS.replace("11.5", "inf"), {}, "got 'inf'"),
    "too large": (PETS.replace("11.5", "4e38"), {}, "finite number of float32; got '4e38'"),
    "no number of a file": (PETS.replace("11.5", "1_0"), {}, "got '1_0'"),
    "a label missing": (PETS.replace("emu", "?"), {}, "line 6, column 'species' must be a label"),
    "a row too short": (
        PETS.replace(",cat", ""),
        {},
        "line 3 must have 4 fields, as the line that names the columns; got 3",
    ),
    "no such column": (
        PETS,
        {"target": "kind"},
        "must have a column 'kind'; got columns 'weight', 'ears', 'species', 'age'",
    ),
    "another delimiter": (
        PETS.replace(",", ";").replace('"', ""),
        {},
        ": delimiter=';' may separate them",
    ),
    "no such feature": (PETS, {"features": ["paws"]}, "must have a column 'paws'"),
    "the target a feature": (PETS, {"features": ["species"]}, "and not the target"),
    "two of a name": (PETS.replace("age", "ears"), {}, "must have one column 'ears'; got 2"),
    "no name": (
        PETS.replace("weight", ""),
        {},
        "got no name for column 1: if it numbers the rows, choose others by features=[...]",
    ),
    "no header": ("1,2\n3,4", {"target": "1"}, "line 1 must name the columns; got numbers"),
    "no rows": ("a,b\n", {"target": "b"}, "and rows below it; got 1 lines"),
    "empty": ("", {}, "and rows below it; got 0 lines"),
    "no text": (bytes(range(256)), {}, "must be a CSV file, text in UTF-8; got other bytes"),
    "bad quotes": ('a,b\n1,2\n"3"4,5\n', {}, "line 3 must be fields separated by ','; got"),
    "quotes of another delimiter": (
        '"a";"b"\n1;2\n',
        {},
        "mend its quotes, or give another delimiter",
    ),
    "constant": (
        "size,kind\n0.1,a\n0.1,b\n0.1,a\n",
        {"target": "kind", "standardise": True},
        "column 'size' must vary to be standardised; got 0.1 in all 3 rows: leave it out",
    ),
    "several constant": (
        "a,b,c,kind\n1,0,7,x\n2,0,7,y\n",
        {"target": "kind", "standardise": True},
        "got 0 in all 2 rows: leave it out by features=[...] (the same goes for 'c')",
    ),
    "squares that underflow": (
        "size,kind\n1e-200,a\n2e-200,b\n",
        {"target": "kind", "standardise": True},
        "column 'size' must vary",
    ),
    "words for a regression": (
        WORDS,
        {"target": "kind", "kind": "numbers"},
        "line 2, column 'kind' must be a finite number of float32; got 'a': correct it, or say "
        "kind='classes'",
    ),
    "a word among numbers": (
        target(1.5, 2, "c"),
        {"target": "kind"},
        "line 4, column 'kind' must be a number, as others; got 'c': correct it, or say kind=",
    ),
    "one class": (target("a", "a"), {"target": "kind"}, "at least 2 classes; got 'a' in all rows"),
    "classes or numbers": (
        target(*range(MAX_CLASSES + 1)),
        {"target": "kind"},
        "kind must be 'classes' or 'numbers', as column 'kind' of",
    ),
    "a class of the test rows": (
        target("a", "z"),
        {"target": "kind", "columns": Columns(("size",), np.array(["a", "b"]))},
        "line 3, column 'kind' must be one of the classes 'a', 'b'; got 'z': correct it, or train",
    ),
    "a name for a list": (PETS, {"features": "weight"}, "features must be a sequence"),
    "settled twice": (PETS, {"columns": Columns(), "standardise": True}, "columns must come with"),
    "another record": (PETS, {"columns": ("weight",)}, "columns must be a jaxnn.Columns; got a t"),
    "figures of others": (
        PETS,
        {"columns": Columns(("ears", "age", "weight"), mean=np.zeros(2), std=np.ones(2))},
        "columns.mean must have 3 entries; got 2",
    ),
    "columns without names": (PETS, {"columns": Columns()}, "columns must have feature_names"),
    "an unknown kind": (PETS, {"kind": "class"}, "kind must be one of 'classes', 'numbers'"),
    "no name of a target": (PETS, {"target": 2}, "target must be the name of a column"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_place_and_what_to_do(load, fault):
    text, options, message = FAULTS[fault]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        load(text, **{"target": "species", **options})
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_csv(tmp_path / "none.csv", target="y")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(mean=np.zeros(3)), "must have both of mean and std"),
        (
            Columns(mean=np.zeros(2), std=np.array([1.0, 0.0])),
            "std must be finite and above 0",
        ),
        (Columns(class_names=np.array(["a", "b"])), "class_names must have 3 entries; got 2"),
        (Columns(feature_names=("a",)), "feature_names must have 2 entries; got 1"),
    ],
)
def test_columns_of_other_rows_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        check_columns("columns", columns, features=2, classes=3)
