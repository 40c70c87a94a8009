"""`tandem plan`: from plan.yaml to the ranked table, the plot and cluster.yaml."""
