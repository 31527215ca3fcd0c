"""The files of a run's report: one that grows by records, and TensorBoard's. What cannot be written ends no run."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ofa_ds.train.report_histograms import Histogram, buckets, span


class Log:
    """A file that grows by whole records. What cannot be written is told when it begins, and counted until the end."""

    def __init__(self, path: Path, head: Callable[[Path], bytes]) -> None:
        """head: makes the file ready, and gives what a run begins with."""
        self._path, self._head = path, head
        self._file: int | None = None
        self._end = self._losses = 0
        self.append(b"")

    def append(self, record: bytes) -> None:
        try:
            if self._file is None:  # it could not be opened; perhaps now
                self._open()
            self._write(record)
        except OSError as error:
            self._losses += 1
            if self._losses == 1:
                self._tell(f"cannot be written: {' '.join(str(error).split())}; training goes on")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._losses:
            self._tell(f"was not written {self._losses} times: those records are lost")

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        head = self._head(self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        self._write(head)

    def _write(self, record: bytes) -> None:
        assert self._file is not None
        written = 0
        try:
            while written < len(record):
                written += os.write(self._file, record[written:])
        except OSError:
            with contextlib.suppress(OSError):  # a device has no end
                os.ftruncate(self._file, self._end)  # no half record that would spoil the next one
            raise
        self._end += written

    def _tell(self, text: str) -> None:
        print(f"metrics: {self._path}: {text}", file=sys.stderr, flush=True)


class Board:
    """TensorBoard's file: a record is an event. Without torch's writer, whose thread dies of a full disk."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        self._event, self._summary, self._histogram = Event, Summary, HistogramProto
        purge = Event(wall_time=time.time(), step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        head = b"".join(_framed(event.SerializeToString()) for event in (version, purge))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._log = Log(folder / name, lambda path: head)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(step, [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()])

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """By tag. One event for all of them: they are of one moment."""
        values = []
        for tag, each in found.items():
            if each.num:
                limits, counts = zip(*buckets(each), strict=True)
                low, high = span(each)
                proto = self._histogram(
                    min=low, max=high, num=each.num, sum=each.total, sum_squares=each.total_of_squares,
                    bucket_limit=limits, bucket=counts,
                )  # fmt: skip
                values.append(self._summary.Value(tag=tag, histo=proto))
            if each.not_finite:
                values.append(self._summary.Value(tag=f"not_finite/{tag}", simple_value=float(each.not_finite)))
        self._add(step, values)

    def picture(self, step: int, tag: str, image_HWC: Any) -> None:  # noqa: N803
        """image_HWC: uint8 [height, width, 3]."""
        from PIL import Image

        height, width, _ = image_HWC.shape
        png = io.BytesIO()
        Image.fromarray(image_HWC).save(png, format="PNG")
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._add(step, [self._summary.Value(tag=tag, image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._log.append(_framed(event.SerializeToString()))

    def close(self) -> None:
        self._log.close()


def _framed(data: bytes) -> bytes:
    """A record of TensorFlow's: length, data, a checksum of each."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
