"""Energy and emissions of a training run, metered by codecarbon without a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.recipe import Training

ENERGY_SOURCE = "codecarbon, mean grid intensity of the country"


class EnergyMeter:
    """This machine's energy since `start`, and the emissions of that much of a country's electricity.

    codecarbon (https://mlco2.github.io/codecarbon/) reads GPUs through NVML and processors through RAPL where the
    system allows, and otherwise estimates from the processor's rated power. Nothing is written or sent.

    Args:
        country_iso_code: three letters; the country whose mean grid intensity counts.

    Raises:
        ImportError: if codecarbon is not installed.
        UserError: for a country that codecarbon does not know.
    """

    def __init__(self, country_iso_code: str) -> None:
        import codecarbon
        from codecarbon.input import DataSource
        from codecarbon.output_methods.base_output import BaseOutput

        if country_iso_code not in DataSource().get_global_energy_mix_data():
            raise UserError(
                f"training.country_iso_code: codecarbon does not know the country '{country_iso_code}'; give the "
                "three letters of ISO 3166, such as FRA or USA"
            )

        class Keep(BaseOutput):
            total: Any = None

            def out(self, total: Any, delta: Any) -> None:
                self.total = total

        self._kept = Keep()
        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=country_iso_code,
            output_methods=[],
            output_handlers=[self._kept],
            allow_multiple_runs=True,
            log_level="error",
        )

    def start(self) -> None:
        """Start counting."""
        self._tracker.start()

    def read(self) -> tuple[float, float]:
        """Energy (kWh) and emissions (grams of CO2 equivalent) since `start`."""
        self._tracker.flush()
        total = self._kept.total
        return (total.energy_consumed, 1000 * total.emissions) if total is not None else (0.0, 0.0)

    def stop(self) -> None:
        """Stop the measuring thread."""
        self._tracker.stop()


def open_meter(training: Training, report: Callable[[str], None]) -> EnergyMeter | None:
    """A meter in one process per machine, where the recipe wants one; without codecarbon one line to `report`."""
    if not training.track_energy or int(os.environ.get("LOCAL_RANK", "0")):
        return None
    try:
        return EnergyMeter(str(training.country_iso_code))
    except ImportError:
        report("energy is not metered, because codecarbon is not installed: pip install 'nanophi[energy]'")
        return None
