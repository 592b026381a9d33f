from hlcli.sim import Simulator


def test_ingest_rank_status(cli, database):
    with Simulator(vaults=60, weight_per_minute=100000) as sim:
        env = {"DATABASE_URL": database, "HL_API_WEIGHT_PER_MINUTE": "100000", **sim.env()}
        for args in (("ingest", "vaults"), ("rank", "vaults"), ("status", "--check")):
            done = cli(*args, **env)
            assert (done.returncode, done.stderr) == (0, ""), done
