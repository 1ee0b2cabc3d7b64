"""Progress lines: seldom, and with a rate that leaves out what was done before."""

from nim4.corpus import progress
from nim4.corpus.progress import Progress


def test_lines_come_every_few_seconds_with_rate_and_time_left(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    resumed, endless = Progress("downloading a", 1000, "MB", before=400), Progress("unpacking b", 0, "MB")
    for _ in range(6):
        now[0] += 2
        resumed.add(50)
        endless.add(10)
    assert [record.getMessage() for record in caplog.records] == [
        "downloading a: 550 of 1000 MB, 25 MB/s, about 18 s left",
        "unpacking b: 30 MB, 5 MB/s",
        "downloading a: 700 of 1000 MB, 25 MB/s, about 12 s left",
        "unpacking b: 60 MB, 5 MB/s",
    ]
