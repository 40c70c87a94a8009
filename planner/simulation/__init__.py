"""The parts of the simulated cluster; planner/simulator.py puts them together."""
