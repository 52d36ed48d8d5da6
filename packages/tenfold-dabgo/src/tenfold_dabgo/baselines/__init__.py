"""Other attribution methods behind the same protocol: `attribute(queries)` gives one
`AttributionResult` per query, so that every evaluator and report takes them unchanged.
"""
