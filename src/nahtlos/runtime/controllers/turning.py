"""A campaign's point of no return, and what may be done before and after it. Pure.

begun --commit, or its end--> final
  '----rollback--> goes back to what its hosts came from
"""

import msgspec

from nahtlos.model.blueprint import Campaign, CampaignState
from nahtlos.model.errors import Conflict
from nahtlos.model.nouns import Component
from nahtlos.runtime.store.campaigns import CampaignRow


def open_one(row: CampaignRow | None) -> Campaign:
    """Conflict without a campaign."""
    if row is None:
        raise Conflict("no campaign is going on", field="campaign", remedy="nahtlos upgrade start RELEASE")
    return row.campaign


def committed(campaign: Campaign) -> Campaign:
    if campaign.rolled_back or campaign.state is CampaignState.CANCELLED:
        what = "is rolled back" if campaign.rolled_back else "is cancelled"
        raise Conflict(f"{campaign.id} {what}", field="campaign", remedy="wait until it has ended")
    return msgspec.structs.replace(campaign, committed=True)


def rolled_back(row: CampaignRow | None) -> Campaign:
    """The campaign, turned round."""
    campaign = open_one(row)
    again = (
        f"nahtlos upgrade start {campaign.from_releases[0]}" if campaign.from_releases else "start another"
    )
    if campaign.component is not Component.HYPERVISOR:
        raise Conflict(
            f"{campaign.id} replaces the {campaign.component} under servers: there is nothing to carry back",
            field="campaign",
            remedy=f"nahtlos upgrade cancel, then start one to the earlier release, --component "
            f"{campaign.component}",
        )
    if campaign.rolled_back:
        raise Conflict(f"{campaign.id} is rolled back already", field="campaign", remedy="wait for its end")
    cancelled = campaign.state is CampaignState.CANCELLED
    if campaign.committed or (campaign.ended_at is not None and not cancelled):
        why = "has ended" if campaign.ended_at is not None else "was committed"
        raise Conflict(
            f"{campaign.id} is past its point of no return: it {why}",
            field="campaign",
            remedy=f"servers may have come to need {campaign.to_release}; ask for what can be done: "
            f"{again.replace('start', 'plan')}",
        )
    if campaign.no_way_back or cancelled:
        why = "was begun without a way back" if campaign.no_way_back else "is cancelled"
        remedy = f"nahtlos upgrade cancel, then {again}" if campaign.no_way_back else again
        raise Conflict(f"{campaign.id} {why}", field="campaign", remedy=remedy)
    if len(campaign.from_releases) != 1:
        came = ", ".join(campaign.from_releases) or "none that is known"
        raise Conflict(
            f"the hosts of {campaign.id} do not come from one release: {came}",
            field="campaign",
            remedy="nahtlos upgrade cancel, then nahtlos upgrade start RELEASE --host HOST for each",
        )
    return msgspec.structs.replace(
        campaign,
        to_release=campaign.from_releases[0],
        from_releases=(campaign.to_release,),
        state=CampaignState.RUNNING,
        rolled_back=True,
    )
