"""`tandem simulate`: from sim.yaml to records, timeline and plots."""
