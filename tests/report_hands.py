"""What a reader does with a report, and sees, by selenium."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "TRACES",
    "change",
    "contrast",
    "drawn",
    "js",
    "move",
    "pixel",
    "prefer",
    "search",
    "text",
    "width",
]

TRACES = "document.getElementById('manhattan').data"


def prefer(driver: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def width(driver: Any, pixels: int) -> None:
    size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def js(driver: Any, expression: str, *arguments: Any) -> Any:
    return driver.execute_script(f"return {expression}", *arguments)


def text(driver: Any, identity: str) -> str:
    found: str = js(driver, "document.getElementById(arguments[0]).textContent", identity)
    return found


def drawn(driver: Any) -> list[tuple[float, float, str]]:
    """The points that plotly holds: x, y, what the hover label says."""
    points = js(
        driver,
        f"{TRACES}.flatMap((t) => [...t.x].map((x, i) => [x, t.y[i], t.text[i]]))",
    )
    return [tuple(point) for point in points]


def pixel(driver: Any, label: str) -> tuple[int, int]:
    """Where on the screen the point is whose label begins so."""
    js(driver, "document.getElementById('manhattan').scrollIntoView({block: 'center'})")
    x, y = js(
        driver,
        f"""(() => {{
          const plot = document.getElementById("manhattan"), box = plot.getBoundingClientRect();
          for (const t of {TRACES}) {{
            const i = t.text.findIndex((text) => text.startsWith(arguments[0]));
            if (i < 0) continue;
            const x = plot._fullLayout[t.xaxis.replace("x", "xaxis")];
            const y = plot._fullLayout[t.yaxis.replace("y", "yaxis")];
            return [box.x + x._offset + x.d2p(t.x[i]), box.y + y._offset + y.d2p(t.y[i])];
          }}
        }})()""",
        label,
    )
    return round(x), round(y)


def move(driver: Any, at: tuple[int, int], click: bool = False) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(driver)
    actions.pointer_action.move_to_location(at[0] - 15, at[1] - 15)
    actions.pointer_action.move_to_location(*at)
    if click:
        actions.pointer_action.pause(0.3)
        actions.pointer_action.click()
    actions.perform()


def change(driver: Any, identity: str, value: str) -> None:
    """Chooses in a select element, as a person does."""
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", identity)).select_by_visible_text(value)


def search(driver: Any, identity: str) -> str:
    field = driver.find_element("id", "query")
    field.clear()
    field.send_keys(identity + "\n")
    return text(driver, "found")


def contrast(driver: Any, selector: str) -> float:
    """Of an element's text against the page's ground (WCAG 2)."""
    script = (
        "[getComputedStyle(document.querySelector(arguments[0])).color,"
        " getComputedStyle(document.body).backgroundColor]"
    )

    def luminance(colour: str) -> float:
        rgb = np.array([float(p) for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, js(driver, script, selector)))
    return (high + 0.05) / (low + 0.05)
