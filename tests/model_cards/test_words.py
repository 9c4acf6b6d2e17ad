from model_cards.words import aligned, duration, thin


def test_duration():
    assert [duration(seconds) for seconds in (41.23, 59.97, 101.2, 3599.6, 7500)] == [
        "41.2 s",
        "1 min 00 s",
        "1 min 41 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_thin():
    assert thin(range(5), 12) == [0, 1, 2, 3, 4]
    assert thin(range(100), 4) == [0, 33, 66, 99]
    assert thin(range(41), 6) == [0, 8, 16, 24, 32, 40]


def test_aligned():
    assert aligned([["", "n"], ["all", "12"], ["a", "7"]]) == "      n\nall  12\n  a   7"
