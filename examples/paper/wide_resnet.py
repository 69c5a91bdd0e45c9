"""Wide residual networks (Zagoruyko & Komodakis, 2016), which torchvision has only in their ImageNet form."""

from __future__ import annotations

from torch import Tensor, nn


class WideBlock(nn.Module):
    """A pre-activation residual block: BatchNorm, ReLU and a 3x3 convolution, twice.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        )
        self.shortcut = (
            None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels_out, H / stride, W / stride)."""
        activated = self.activate(x)
        # A shortcut that changes the shape starts from the activated input, an identity from the input itself.
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.residual(activated)


class WideResNet(nn.Sequential):
    """WRN-depth-widen for 32x32 images: three groups of (depth - 4) / 6 blocks, no dropout.

    Args:
        depth: The number of convolutional layers, 6n + 4.
        widen: The factor k on the channels 16, 32 and 64 of the three groups.
        outputs: The number of classes.

    Raises:
        ValueError: If the depth is not of the form 6n + 4, or the factor is not positive.
    """

    def __init__(self, depth: int, widen: int, outputs: int) -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"`depth` must be 6n + 4 with n >= 1, such as 16 or 28; got {depth}.")
        if widen < 1:
            raise ValueError(f"`widen` must be at least 1; got {widen}.")
        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for group, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for block in range((depth - 4) // 6):
                layers.append(WideBlock(channels, width, stride=2 if group > 0 and block == 0 else 1))
                channels = width
        head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, *head, nn.Linear(channels, outputs))
