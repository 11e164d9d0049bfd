"""A fault campaign: jobs are driven through a real system while its parts are killed, frozen, cut off and lied to.

plan ─► driver: submits, cancels, watches ──┐
                                            ├─► audit: what was promised, looked at from outside
        faults: one for every few jobs ─────┘

A seed makes the plan of jobs and faults; what the clocks of the machine make of it, no seed can say.
"""
