"""A YOLO model of ultralytics, as a function from pictures to detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.runners.detection_answer import Detection, Found
from engine.runners.detection_library import load
from engine.runners.detection_request import Filters, Names
from engine.runners.media import decode_image
from engine.runners.memory import give_back
from engine.runners.spec import RunnerSpec

if TYPE_CHECKING:
    from engine.runners.parked_weights import ParkedWeights

#: Side in pixels of the square that pictures are fitted into, ultralytics' own default.
DEFAULT_SIZE = 640
STRIDE = 32


@dataclass(frozen=True)
class Picture:
    """A decoded picture: BGR pixels of shape (height / scale, width / scale, 3), and the size it came in."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    scale: int = 1


def decode_picture(data: bytes, *, max_pixels: int, keep: int, param: str) -> Picture:
    """Decodes a picture as a viewer shows it (EXIF orientation applied, transparency dropped).

    One whose longer side is at least twice ``keep`` pixels is averaged down by a whole factor, to no less
    than ``keep``: the network sees less than that anyway, and what waits in the queue stays small.

    Raises:
        ApiError: 400, see :func:`engine.runners.media.decode_image`.
    """
    image = decode_image(data, max_pixels=max_pixels, param=param)
    width, height = image.size
    rgb = image.convert("RGB")
    scale = max(1, max(width, height) // keep)
    if scale > 1:
        rgb = rgb.reduce(scale)
    return Picture(np.ascontiguousarray(np.asarray(rgb)[..., ::-1]), width, height, scale)


class Detector:
    """Loads a ``.pt`` file of ultralytics and predicts.

    Such a file is a pickle and runs code when loaded: only files whose checksum is known may get here.
    Options of the specification: ``image_size`` (pixels, default 640), ``half`` (16-bit floats on a GPU).

    Raises:
        OSError: no weights.
        ValueError: the model does not detect boxes.
    """

    _model: Any  # an ultralytics.YOLO; None while asleep on a CPU
    _predictor: Any

    def __init__(self, spec: RunnerSpec) -> None:
        self._spec = spec
        # The environment already limits the visible GPUs to this runner's own.
        self._device = "cuda:0" if spec.device.startswith("cuda") else "cpu"
        self._size = int(spec.options.get("image_size", DEFAULT_SIZE))
        self._half = bool(spec.options.get("half", False))
        self._weights: ParkedWeights | None = None
        self._load()
        self._names: dict[int, str] = dict(self._model.names)

    @property
    def names(self) -> Names:
        """Class names by id."""
        return self._names

    @property
    def keep(self) -> int:
        """The ``keep`` of :func:`decode_picture`."""
        return 2 * self._size

    def predict(self, pictures: Sequence[Picture], filters: Filters) -> list[Found]:
        """Finds objects in pictures of one shape; each gets what it would get alone."""
        results = self._model.predict(
            [picture.pixels for picture in pictures],
            predictor=self._predictor,
            conf=filters.confidence,
            iou=filters.iou,
            max_det=filters.max_detections,
            classes=None if filters.classes is None else list(filters.classes),
            imgsz=self._size,
            quantize=16 if self._half else None,
            device=self._device,
            save=False,
            verbose=False,
        )
        return [self._found(picture, result) for picture, result in zip(pictures, results, strict=True)]

    def sleep(self) -> None:
        """Gives the network's memory back.

        On a CPU the network itself goes: what it computes with (layers fused, floats of 32 bits) stands in no
        file that could be mapped.
        """
        if self._device == "cpu":
            self._model = self._predictor = None
            give_back(cycles=True)
            return
        if self._weights is None:
            from engine.runners.parked_weights import ParkedWeights

            # The network as it was loaded, and the fused copy of it that predicts.
            networks = [self._model.model, self._model.predictor.model.backend.model]
            self._weights = ParkedWeights(networks, self._spec.model_dir)
        self._weights.put_away()

    def wake(self) -> None:
        """Takes the memory again.

        Raises:
            OSError: the weights have gone.
            RuntimeError: the device has not enough memory.
        """
        if self._weights is not None:
            self._weights.take_back()
        elif self._model is None:
            self._load()

    def _load(self) -> None:
        settings = self._spec.socket.parent / "ultralytics"
        self._model = load(self._spec.model_dir, self._device, settings=settings)
        import torch

        self._predictor = _one_by_one_predictor()
        # The first prediction builds the fused network; ultralytics sets its own thread count with it.
        blank = Picture(np.zeros((self._size, self._size, 3), np.uint8), self._size, self._size)
        self.predict([blank], Filters())
        torch.set_num_threads(self._spec.threads)

    def _found(self, picture: Picture, result: Any) -> Found:
        boxes = result.boxes.cpu().numpy()
        order = np.argsort(-boxes.conf, kind="stable")
        limit = np.array([picture.width, picture.height] * 2)
        corners = np.clip(boxes.xyxy[order] * picture.scale, 0, limit).tolist()
        detections = [
            Detection(self._names[int(index)], int(index), float(confidence), *corner)
            for index, confidence, corner in zip(boxes.cls[order], boxes.conf[order], corners, strict=True)
        ]
        return Found(detections, picture.width, picture.height, self._cells(picture))

    def _cells(self, picture: Picture) -> int:
        """32-pixel cells of the picture as fitted into the square, each side filled up to whole ones."""
        ratio = self._size / max(picture.width, picture.height)
        across, down = (max(1, -(-round(side * ratio) // STRIDE)) for side in (picture.width, picture.height))
        return across * down


def shared_shape(picture: Picture) -> tuple[int, ...]:
    """Pictures of one shape can share a batch: ultralytics fits mixed ones differently than each alone."""
    return picture.pixels.shape


def _one_by_one_predictor() -> Any:
    from ultralytics.models.yolo.detect import DetectionPredictor

    class OneByOne(DetectionPredictor):  # type: ignore[misc]  # ultralytics has no types
        """Suppresses overlaps picture by picture.

        Over a whole batch ultralytics stops after a time limit and leaves the later pictures without boxes.
        """

        batch: Any

        def postprocess(self, preds: Any, img: Any, orig_imgs: Any, **options: Any) -> list[Any]:
            batch = preds[0] if isinstance(preds, list | tuple) else preds
            results: list[Any] = []
            whole = self.batch
            for index, original in enumerate(orig_imgs):
                one = slice(index, index + 1)
                self.batch = (whole[0][one], *whole[1:])
                results += super().postprocess(batch[one], img[one], [original], **options)
            self.batch = whole
            return results

    return OneByOne
