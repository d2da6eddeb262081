"""What is done with stored rows: K/V columns saved and put back, digests of rows, sums over ranks in one order."""
