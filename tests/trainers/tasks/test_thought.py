"""Tasks of models that think in ticks: what they generate, what they read, and what they refuse."""

import sys
import types

import datasets
import networkx as nx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from trainers.errors import UserError
from trainers.tasks.thought import (
    THOUGHT_TASKS,
    ThoughtTaskArguments,
    draw_maze,
    get_thought_task,
    read_maze,
)
from trainers.tasks.thought.mazes import WAIT, Maze

SPLITS = ("train", "validation", "test")


def task(name, options=None, **arguments):
    return get_thought_task(ThoughtTaskArguments(name=name, options=options or {}, **arguments))


def sizes(train=30, validation=10, test=10):
    return {"num_train": train, "num_validation": validation, "num_test": test}


def images_in(folder, split, colours=("red", "blue"), number=3, size=(6, 5), mode="RGB"):
    """Single-coloured images, a folder for each colour."""
    for colour in colours:
        (folder / split / colour).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            Image.new("RGB", size, colour).convert(mode).save(folder / split / colour / f"{index}.png")


def test_unknown_task_and_options():
    with pytest.raises(UserError, match=r"task.name: unknown task 'maze'; did you mean 'mazes'\?"):
        task("maze")
    with pytest.raises(UserError, match=r"unknown option 'lenght'; did you mean 'length'\?"):
        task("parity", {"lenght": 3})
    with pytest.raises(UserError, match="length is 0; it must be at least 1"):
        task("parity", {"length": 0})
    with pytest.raises(UserError, match=r"task.data_dir: the task parity does not read it"):
        task("parity", data_dir="somewhere")
    with pytest.raises(UserError, match=r"task.hub_id: the task mazes does not read it"):
        task("mazes", hub_id="someone/mazes")
    for field, value in (("max_train_samples", 0), ("split_seed", -1), ("validation_fraction", 1)):
        with pytest.raises(StrictDataclassError, match=f"{field} is {value}; it must "):
            ThoughtTaskArguments(name="parity", **{field: value})


@pytest.mark.parametrize("name", ["parity", "mazes", "sorting"])
def test_an_example_depends_on_seed_split_and_index_alone(name):
    options = {"parity": {"length": 10}, "mazes": {"cells": 4}, "sorting": {}}[name]
    one, other = task(name, {**options, **sizes()}), task(name, {**options, **sizes(train=50, test=3)})
    elsewhere = task(name, {**options, **sizes(), "seed": 1})
    key = one.input_name
    assert other.examples("train")[7][key].equal(one.examples("train")[7][key])
    assert one.examples("train")[-1][key].equal(one.examples("train")[29][key])
    assert not one.examples("train")[7][key].equal(one.examples("test")[7][key])
    assert not elsewhere.examples("train")[7][key].equal(one.examples("train")[7][key])
    item = one.examples("train")[7]
    assert item["labels"].dtype == torch.int64
    assert item["labels"].tolist() == one.examples("train").labels(7).tolist()
    with pytest.raises(IndexError):
        one.examples("train")[30]


class TestParity:
    def test_splits_hold_every_sequence_once(self):
        parity = task("parity", {"length": 6, "num_validation": 7, "num_test": 7})
        assert parity.arguments.options["num_train"] == 50  # 4 places more in the last, unfinished cycle
        seen = [tuple(parity.signs(split, index)) for split in SPLITS for index in range(len(parity.examples(split)))]
        assert len(seen) == len(set(seen)) == 2**6
        assert set(np.array(seen).flatten()) == {1, -1}

    def test_target_and_difficulty(self):
        examples = task("parity", {"length": 9, **sizes()}).examples("train")
        for index in range(30):
            signs = examples[index]["input_values"].tolist()
            negative, expected = 0, []
            for sign in signs:
                negative += sign == -1
                expected.append(negative % 2)
            assert examples.labels(index).tolist() == expected
            assert examples.difficulty(index) == negative

    def test_more_than_there_are(self):
        with pytest.raises(UserError, match="num_test is 7, but length 5 gives only 4 different test examples"):
            task("parity", {"length": 5, "num_test": 7, "num_validation": 1})

    def test_trivial_prediction(self):
        parity = task("parity", {"length": 4, "num_validation": 1, "num_test": 1})
        train = parity.examples("train")
        labels = np.stack([train.labels(index) for index in range(len(train))])
        _, answer = parity.trivial_prediction(train)
        assert (np.abs(answer - labels).sum(axis=0) <= len(train) / 2).all()

    def test_reading(self):
        assert task("parity").reading(np.array([1, 0, 1]), np.array([0, -100, 1])) == "odd odd"


class TestMazes:
    def test_walls_make_a_tree_and_the_route_is_the_only_way(self):
        rng = np.random.default_rng(3)
        for _ in range(10):
            maze = draw_maze(5, rng, 6, 20)
            places = {tuple(place) for place in np.argwhere(maze.free).tolist()}
            graph = nx.grid_2d_graph(*maze.free.shape).subgraph(places)
            assert nx.is_tree(graph)
            assert maze.free[1::2, 1::2].all()
            assert not maze.free[[0, -1]].any()
            assert not maze.free[:, [0, -1]].any()
            start, goal = (tuple(maze.route[end].tolist()) for end in (0, -1))
            assert [list(place) for place in nx.shortest_path(graph, start, goal)] == maze.route.tolist()
            assert 6 <= len(maze.moves) <= 20
            assert maze.walk([*maze.moves, WAIT, 0])[-1] == goal

    def test_a_walk_ends_at_a_wall(self):
        maze = Maze(np.array([[1, 1, 0]], dtype=bool), np.array([[0, 0], [0, 1]]))
        assert maze.walk([3, 3, 2]) == [(0, 0), (0, 1)]
        assert maze.walk([0]) == maze.walk([2]) == [(0, 0)]

    def test_picture_is_read_back(self):
        maze = draw_maze(6, np.random.default_rng(0), 2, 70)
        read = read_maze(maze.picture(with_route=True))
        assert (read.free == maze.free).all()
        assert (read.route == maze.route).all()
        plain = maze.picture()
        assert set(map(tuple, plain.reshape(-1, 3).tolist())) == {(0, 0, 0), (255,) * 3, (255, 0, 0), (0, 255, 0)}

    def test_splits_share_no_walls(self):
        mazes = task("mazes", {"cells": 4, **sizes(60, 20, 20)})
        walls = [
            {mazes.examples(split).maze(index).free.tobytes() for index in range(len(mazes.examples(split)))}
            for split in SPLITS
        ]
        assert walls[0].isdisjoint(walls[1] | walls[2])
        assert walls[1].isdisjoint(walls[2])

    def test_example(self):
        mazes = task("mazes", {"cells": 4, "max_moves": 8, "route_length": 10, **sizes()})
        examples = mazes.examples("validation")
        item, maze = examples[2], examples.maze(2)
        assert item["pixel_values"].shape == (3, 9, 9)
        assert item["pixel_values"].unique().tolist() == [-1, 1]
        moves = len(maze.moves)
        assert item["labels"].tolist() == [*maze.moves, *[WAIT] * (10 - moves)]
        assert examples.difficulty(2) == moves
        processed = mazes.image_processor()(Image.fromarray(maze.picture()), return_tensors="pt")
        torch.testing.assert_close(processed["pixel_values"][0], item["pixel_values"])
        wrong_wait = item["labels"].numpy().copy()
        wrong_wait[-1] = 0
        assert mazes.extra_scores(wrong_wait, item["labels"].numpy()) == {"reaches_goal": True}
        wrong_wait[0] = WAIT
        assert mazes.extra_scores(wrong_wait, item["labels"].numpy()) == {"reaches_goal": False}

    def test_routes_longer_than_an_answer(self):
        with pytest.raises(UserError, match="routes of up to 48 moves do not fit route_length = 10; set max_moves"):
            task("mazes", {"route_length": 10})
        cut = task("mazes", {"route_length": 4, "long_routes": "cut", "min_moves": 8, **sizes()})
        assert WAIT not in cut.examples("train").labels(0)
        with pytest.raises(UserError, match="max_moves is 4; it must be at least min_moves = 6"):
            task("mazes", {"min_moves": 6, "max_moves": 4})
        with pytest.raises(UserError, match="min_moves is 50; 5 cells give at most 48"):
            task("mazes", {"min_moves": 50})

    def test_no_such_maze(self, monkeypatch):
        monkeypatch.setattr("trainers.tasks.thought.mazes.MOST_DRAWS", 3)
        with pytest.raises(UserError, match=r"task.options: found no maze with a route of 30 to 30 moves in 3 draws"):
            task("mazes", {"cells": 4, "min_moves": 30, **sizes()}).examples("train")[0]

    @pytest.fixture
    def folder(self, tmp_path):
        """Generated mazes as PNG files; the second training maze is a copy of the first of the test."""
        rng = np.random.default_rng(1)
        for split, number in (("train", 8), ("test", 2)):
            (tmp_path / split / "0").mkdir(parents=True)
            for index in range(number):
                maze = draw_maze(4, rng, 4, 8)
                Image.fromarray(maze.picture(with_route=True)).save(tmp_path / split / "0" / f"{index}.png")
        (tmp_path / "train" / "0" / "1.png").write_bytes((tmp_path / "test" / "0" / "0.png").read_bytes())
        return tmp_path

    def test_folder(self, folder):
        mazes = task("mazes", {"route_length": 8}, data_dir=str(folder), validation_fraction=0.5)
        names = {split: mazes.examples(split).names for split in SPLITS}
        assert names["test"] == ["test/0/0.png", "test/0/1.png"]
        assert len(names["train"]) + len(names["validation"]) == 7
        assert "train/0/1.png" not in names["train"] + names["validation"]
        maze = mazes.examples("test").maze(1)
        assert maze.walk(maze.moves)[-1] == tuple(maze.route[-1])
        assert len(task("mazes", {"route_length": 8}, data_dir=str(folder), max_test_samples=1).examples("test")) == 1
        rows = list(mazes.fingerprint_rows({"test": mazes.examples("test")}))
        assert rows[0][:2] == ["test", "test/0/0.png"]

    def test_folder_with_a_validation_split(self, folder):
        """What comes in a later split is in no earlier one, by the walls and not by the file."""
        (folder / "validation" / "0").mkdir(parents=True)
        for number, source in enumerate(("train/0/2.png", "train/0/3.png", "test/0/1.png")):
            (folder / "validation" / "0" / f"{number}.png").write_bytes((folder / source).read_bytes())
        mazes = task("mazes", {"route_length": 8}, data_dir=str(folder))
        assert mazes.source == "local PNG files of mazes"
        assert mazes.examples("validation").names == ["validation/0/0.png", "validation/0/1.png"]
        assert mazes.examples("train").names == [f"train/0/{number}.png" for number in (0, 4, 5, 6, 7)]
        for file in (folder / "train" / "0").iterdir():
            file.write_bytes((folder / "test" / "0" / "0.png").read_bytes())
        with pytest.raises(UserError, match=r"^task.data_dir: .* leaves no mazes for train$"):
            task("mazes", {"route_length": 8}, data_dir=str(folder)).examples("train")

    def spoil(self, folder, change):
        file = folder / "test" / "0" / "1.png"
        pixels = np.array(Image.open(file))
        change(pixels)
        Image.fromarray(pixels).save(file)
        return task("mazes", {"route_length": 8}, data_dir=str(folder))

    def test_foreign_colour(self, folder):
        def change(pixels):
            pixels[0, 3] = (1, 2, 3)

        with pytest.raises(UserError, match=r"1.png: the pixel in row 0, column 3 is \(1, 2, 3\); a maze has only"):
            self.spoil(folder, change).examples("test")

    def test_two_starts(self, folder):
        def change(pixels):
            pixels[0, 0] = (255, 0, 0)

        with pytest.raises(UserError, match=r"1.png: 2 red pixels; a maze has one, its start"):
            self.spoil(folder, change).examples("test")

    def test_no_route(self, folder):
        def change(pixels):
            pixels[(pixels == (0, 0, 255)).all(-1)] = 255

        with pytest.raises(UserError, match=r"1.png: no blue route leads from the red start to the green goal"):
            self.spoil(folder, change).examples("test")

    def test_route_too_long(self, folder):
        with pytest.raises(UserError, match=r"png: the route has \d moves, task.options route_length is 2; raise it"):
            task("mazes", {"route_length": 2}, data_dir=str(folder)).examples("test")
        cut = task("mazes", {"route_length": 2, "long_routes": "cut"}, data_dir=str(folder)).examples("test")
        assert len(cut.labels(0)) == 2

    def test_other_files(self, folder):
        maze = draw_maze(5, np.random.default_rng(0), 2, 8)
        Image.fromarray(maze.picture(with_route=True)).save(folder / "test" / "larger.png")
        with pytest.raises(UserError, match=r"larger.png: the picture has 11x11 pixels, .*png has 9x9; all mazes"):
            task("mazes", {"route_length": 8}, data_dir=str(folder)).examples("test")
        (folder / "test" / "larger.png").write_text("no picture")
        with pytest.raises(UserError, match=r"larger.png: cannot identify image file"):
            task("mazes", {"route_length": 8}, data_dir=str(folder)).examples("test")
        with pytest.raises(UserError, match=r"task.data_dir: .* has no folder 'train' with PNG files"):
            task("mazes", data_dir=str(folder / "test")).examples("test")


class TestImages:
    def test_folder(self, tmp_path):
        images_in(tmp_path, "train", number=6)
        images_in(tmp_path, "test", mode="L")
        images = task("images", data_dir=str(tmp_path), validation_fraction=0.25)
        assert images.classes == ["blue", "red"]
        assert images.config_values()["id2label"] == {0: "blue", 1: "red"}
        assert [len(images.examples(split)) for split in SPLITS] == [9, 3, 6]
        item = images.examples("train")[0]
        assert item["pixel_values"].shape == (3, 5, 6)
        colour = [-1, -1, 1] if item["labels"] == 0 else [1, -1, -1]
        assert item["pixel_values"][:, 2, 2].tolist() == colour
        assert images.examples("train").picture(0).shape == (5, 6, 3)
        grey = images.examples("test")[0]["pixel_values"]
        assert grey.shape == (3, 5, 6)
        assert grey[0].equal(grey[1])
        names = [images.examples(split).identity(index) for split in SPLITS for index in range(3)]
        assert len(set(names)) == 9

    def test_sizes(self, tmp_path):
        images_in(tmp_path, "train")
        images_in(tmp_path, "test", size=(7, 7))
        images = task("images", data_dir=str(tmp_path))
        images.examples("train")
        with pytest.raises(
            UserError, match=r"/test/blue/0.png: has 7x7 pixels, others 5x6; give task.options image_size"
        ):
            images.examples("test")
        resized = task("images", {"image_size": 4}, data_dir=str(tmp_path))
        assert resized.examples("test")[0]["pixel_values"].shape == (3, 4, 4)

    def test_unkept_images_are_the_same(self, tmp_path, monkeypatch):
        images_in(tmp_path, "train")
        images_in(tmp_path, "test")
        kept = task("images", data_dir=str(tmp_path)).examples("test")
        monkeypatch.setattr("trainers.tasks.thought.images.MOST_KEPT", 0)
        read = task("images", data_dir=str(tmp_path)).examples("test")
        assert kept[3]["pixel_values"].equal(read[3]["pixel_values"])

    def test_what_is_missing(self, tmp_path):
        with pytest.raises(UserError, match="reads hub_id or data_dir; give one of the two"):
            task("images")
        with pytest.raises(UserError, match="reads hub_id or data_dir; give one of the two"):
            task("images", hub_id="a/b", data_dir="c")
        with pytest.raises(UserError, match=r"task.data_dir: .*nowhere is no folder"):
            task("images", data_dir=str(tmp_path / "nowhere")).classes  # noqa: B018 (a property that reads)
        images_in(tmp_path, "train")
        with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
            task("images", data_dir=str(tmp_path)).classes  # noqa: B018
        images_in(tmp_path, "test")
        with pytest.raises(UserError, match=r"label_column is 'lable'; did you mean 'label'\?"):
            task("images", {"label_column": "lable"}, data_dir=str(tmp_path)).classes  # noqa: B018
        loose = tmp_path / "loose"
        for split in ("train", "test"):
            (loose / split).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(loose / split / "0.png")
        with pytest.raises(
            UserError, match=r"loose holds images directly in test, train; they must lie in a folder for"
        ):
            task("images", data_dir=str(loose)).classes  # noqa: B018
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"^task.data_dir: cannot load the images of .*empty: "):
            task("images", data_dir=str(tmp_path / "empty")).classes  # noqa: B018
        few = task("images", data_dir=str(tmp_path))
        loaded, *columns = few.load()
        few.load = lambda: ({**loaded, "train": loaded["train"].select([0])}, *columns)
        with pytest.raises(UserError, match="1 training images leave none"):
            few.examples("train")

    def test_a_split_for_validation_and_fewer_images(self, tmp_path):
        for split, number in (("train", 6), ("validation", 4), ("test", 3)):
            images_in(tmp_path, split, number=number)
        images = task("images", data_dir=str(tmp_path), max_train_samples=5, max_test_samples=2)
        assert [len(images.examples(split)) for split in SPLITS] == [5, 8, 2]
        again = task("images", data_dir=str(tmp_path), max_train_samples=5)
        names = [images.examples("train").identity(index) for index in range(5)]
        assert names == [again.examples("train").identity(index) for index in range(5)], "the same are drawn again"
        assert names != [f"train-{row}" for row in range(1, 6)], "not the first, which are all of one class"
        other = task("images", {"test_split": "validation"}, data_dir=str(tmp_path), validation_fraction=0.25)
        assert [len(other.examples(split)) for split in SPLITS] == [9, 3, 8]

    def test_files_that_are_no_images(self, tmp_path):
        images_in(tmp_path, "train")
        images_in(tmp_path, "test")
        file = tmp_path / "test" / "red" / "1.png"
        content = bytearray(file.read_bytes())
        content[45] ^= 255
        for damaged in (b"", b"no image", bytes(content)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"/test/red/1.png: cannot be read as an image$"):
                task("images", data_dir=str(tmp_path)).examples("test")

    def test_a_data_set_of_the_hub(self, monkeypatch):
        asked = []
        picture = Image.new("RGB", (4, 4), "red")

        def made(labels, pictures=None, **more):
            columns = {"picture": [picture] * len(labels) if pictures is None else pictures, "label": labels, **more}
            kinds = {name: datasets.ClassLabel(names=["a", "b"]) for name in columns if name != "picture"}
            rows = datasets.Dataset.from_dict(columns, datasets.Features(picture=datasets.Image(), **kinds))
            return datasets.DatasetDict(train=rows, test=rows)

        def load(*names, **options):
            asked.append((names, options))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr("datasets.load_dataset", load)
        found = made([0, 1, 1, -1])
        images = task("images", hub_id="ann/pictures", hub_config="small", hub_revision="v1")
        assert images.source == "ann/pictures (small) at v1"
        with pytest.raises(
            UserError, match=r"^ann/pictures \(small\) at v1, test, row 4, label: -1 is none of the 2 c"
        ):
            images.examples("test")
        assert asked == [(("ann/pictures", "small"), {"revision": "v1"})]
        found = made([0, 1], [picture, None])
        with pytest.raises(UserError, match=r"^ann/pictures, test, row 2, image: cannot be read as an image$"):
            task("images", hub_id="ann/pictures").examples("test")
        found = made([0, 1], other=[1, 0])
        with pytest.raises(UserError, match=r"give label_column; columns of ann/pictures with a .*: label, other"):
            task("images", hub_id="ann/pictures").examples("test")
        assert len(task("images", {"label_column": "other"}, hub_id="ann/pictures").examples("test")) == 2
        found = ConnectionError("no\nnetwork")
        with pytest.raises(UserError, match=r"^task.hub_id: cannot load the images of ann/pictures: no network$"):
            task("images", hub_id="ann/pictures").examples("test")


class TestDigits:
    @pytest.fixture
    def scikit_learn(self, monkeypatch):
        """A stand-in with twenty images, each of one grey level."""
        grey = np.ones((20, 8, 8)) * np.arange(20)[:, None, None] % 17
        digits = types.SimpleNamespace(images=grey, target=np.arange(20) % 10)
        module = types.SimpleNamespace(load_digits=lambda: digits)
        monkeypatch.setitem(sys.modules, "sklearn", types.SimpleNamespace(datasets=module))
        monkeypatch.setitem(sys.modules, "sklearn.datasets", module)

    def test_digits(self, scikit_learn):
        digits = task("digits", {"image_size": 16})
        assert [len(digits.examples(split)) for split in SPLITS] == [14, 2, 4]
        assert digits.classes == [str(number) for number in range(10)]
        assert digits.examples("test")[0]["pixel_values"].shape == (3, 16, 16)
        levels = sorted(
            round((examples[index]["pixel_values"].mean().item() + 1) * 8)
            for examples in map(digits.examples, SPLITS)
            for index in range(len(examples))
        )
        assert levels == sorted(number % 17 for number in range(20))

    def test_other_sources_are_refused(self, scikit_learn):
        with pytest.raises(UserError, match=r"task.data_dir: the task digits comes with scikit-learn"):
            task("digits", data_dir="somewhere")

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(UserError, match=r"scikit-learn, which is not installed: pip install 'adaptive-reasoners\["):
            task("digits").examples("train")


def test_sorting():
    sorting = task("sorting", {"length": 5, **sizes()})
    examples = sorting.examples("train")
    item = examples[3]
    assert item["input_features"].shape == (6, 5)
    numbers = item["input_features"][0]
    assert item["input_features"][1:].equal(torch.eye(5))
    assert numbers[item["labels"] - 1].equal(numbers.sort().values)
    assert sorting.config_values()["prediction_reshaper"] == [6]
    assert sorting.reading(np.array([2, 1]), np.array([1, 1])) == "1 0"


def test_every_task_has_a_row_in_the_table():
    import trainers.tasks.thought

    assert all(f"| `{name}` |" in trainers.tasks.thought.__doc__ for name in THOUGHT_TASKS)
