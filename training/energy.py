"""Energy and emissions of a training run, metered by codecarbon without a network.

codecarbon (https://mlco2.github.io/codecarbon/) reads GPUs through NVML and processors through RAPL where the system
allows, and otherwise estimates from the processor's rated power. Nothing is written or sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.recipe import Training

ENERGY_SOURCE = "codecarbon, mean grid intensity of the country"


class EnergyMeter:
    """This machine's energy within a `with` block; nothing, where the recipe does not ask or another process meters.

    Raises:
        UserError: for a country that codecarbon does not know. Without codecarbon there is one line to `report`.
    """

    def __init__(self, training: Training, report: Callable[[str], None]) -> None:
        self._tracker: Any = None
        self._total: Any = None
        self.region = training.country_iso_code
        if not training.track_energy or int(os.environ.get("LOCAL_RANK", "0")):
            return
        try:
            import codecarbon
            from codecarbon.input import DataSource
            from codecarbon.output_methods.base_output import BaseOutput
        except ImportError:
            report("energy is not metered, because codecarbon is not installed: pip install 'nanophi[energy]'")
            return
        if self.region not in DataSource().get_global_energy_mix_data():
            raise UserError(
                f"training.country_iso_code: codecarbon does not know the country '{self.region}'; give the "
                "three letters of ISO 3166, such as FRA or USA"
            )

        class Keep(BaseOutput):
            def out(_, total: Any, delta: Any) -> None:  # noqa: N805
                self._total = total

        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=self.region,
            output_methods=[],
            output_handlers=[Keep()],
            allow_multiple_runs=True,
            log_level="error",
        )

    def __enter__(self) -> EnergyMeter:
        if self._tracker is not None:
            self._tracker.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker is not None:
            self._tracker.stop()

    def read(self) -> tuple[float, float]:
        """Energy (kWh) and emissions (grams of CO2 equivalent) so far."""
        if self._tracker is not None:
            self._tracker.flush()
        return (self._total.energy_consumed, 1000 * self._total.emissions) if self._total is not None else (0.0, 0.0)

    def entry(self, step: int, energy_kwh: float, co2_grams: float) -> dict[str, Any]:
        """A log entry with the energy of all machines so far."""
        metered = {"energy_kwh": energy_kwh, "co2_grams": co2_grams}
        return {"step": step, **metered, "co2_source": ENERGY_SOURCE, "co2_region": self.region}
