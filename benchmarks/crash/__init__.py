"""The parts of `benchmarks.ledger_crash`: a Hearth without engines, its callers, its killer, its auditor."""
