"""The masking protocol, sans-IO: what is guaranteed, against whom, and the driver's contract.

Against a malicious coordinator together with up to n_c silos, and anyone on the network: nobody but
its owner learns an update, only sums over at least t silos of one cohort that agree on the session,
the model, the roster and the survivors. Against faulty clients alone: the result is the exact sum
of the survivors' vectors or ``RoundAborted``, and whoever is certainly at fault is named. What is
not promised is listed in ``threat_model/``.

The driver's contract, with a ledger whose ``record`` is durable when it returns:

    state = admit(descriptor, member, expected, ledger)
    state, advert = advertise_keys(state, ledger.record(state.entry), entropy=…)    # then send
    state, shares = share_keys(state, roster, entropy=…)                            # then send
    state, commit, vector = mask_input(state, dealt, encoded)                       # upload, send
    state, signed = check_survivors(state, survivors, ledger)                       # then send
    state = check_consistency(state, signatures)
    state, reveal = reveal_shares(state, ledger.record(state.entry))                # then send
    tau4 = check_result(result, member, expected, state)

A message that may not have arrived is sent again as it is. Any exception ends the attempt for this
client: drop the state, say nothing more. Source: Bonawitz et al., Practical Secure Aggregation for
Privacy-Preserving Machine Learning, CCS 2017 (ePrint 2017/281), Fig. 4.
"""
