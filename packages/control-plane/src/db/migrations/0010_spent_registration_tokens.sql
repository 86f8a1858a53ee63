-- A registration token stays after it was used, until what it gave is: the agent
-- whose answer was lost, or that died before it stored it, shows it again.
alter table host_registration_tokens add column spent_at timestamptz(3);
