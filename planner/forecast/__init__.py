"""What one prefill and one decode worker on this machine will do with a load."""
