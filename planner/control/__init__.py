"""The online controller: windows of load in, wanted placements out."""
