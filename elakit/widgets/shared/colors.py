"""Color maps of the widgets: perceptually uniform and suitable for all common kinds of color blindness."""

from __future__ import annotations

import numpy as np

# 52 evenly spaced colors each; linear interpolation between them stays within 4/255 of matplotlib's tables (CC0), by
# van der Walt and Smith (viridis, magma) and by Nunez, Anderton and Renslow (cividis).
TABLES = {
    "viridis": (
        "44015446085c471063481769481d6f482475472a7a46307e453781433d844142873f48893d4e8a3a538b38598c355e8d33638d31688e"
        "2e6d8e2c718e2a768e297b8e27808e25848e23898e218e8d20928c1f978b1e9c891fa18821a58524aa8328ae802eb37c35b7793dbc74"
        "46c06f50c46a5ac86465cb5e70cf577cd25089d54895d840a2da37b0dd2fbddf26cae11fd8e219e5e419f1e51dfde725"
    ),
    "magma": (
        "00000402020b0504160907200e0b2b140e361a104221114e29115a311165390f6e420f754a107952137c5a167e6219806a1c81721f81"
        "792282812581892881912b81992d80a1307eaa337db2357bba3878c23b75ca3e72d2426fd9466be04c67e75263ec5860f1605df4695c"
        "f7725cf97b5dfb8560fc8e64fd9869fea16efeaa74feb47bfebd82fec68afecf92fed89afde2a3fdebacfcf4b6fcfdbf"
    ),
    "cividis": (
        "00224e002656002a5f002d68003070083370163770203a6f273e6e2e416d34456c3a486c3f4c6c444f6c49536c4e566c535a6d575d6d"
        "5c616e60646f656870696b716d6f727272747676767a7a787e7d788381798885788d8878928c789690779b9476a09875a59c74aaa073"
        "afa471b5a86fbaac6dbfb06bc4b468c9b965cfbd62d4c15fdac65bdfca57e5cf52ead34cf0d846f6dd3ffce236fee838"
    ),
}


def lookup(name: str) -> np.ndarray:
    """The 256 colors of a color map, as a table of red, green and blue.

    Parameters
    ----------
    name : {"viridis", "magma", "cividis"}

    Returns
    -------
    numpy.ndarray, uint8 (256, 3)

    Examples
    --------
    >>> lookup("viridis")[[0, 255]].tolist()
    [[68, 1, 84], [253, 231, 37]]
    """
    stops = np.frombuffer(bytes.fromhex(TABLES[name]), np.uint8).reshape(-1, 3)
    at = np.linspace(0, len(stops) - 1, 256)
    mixed = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(mixed, axis=1)).astype(np.uint8)
