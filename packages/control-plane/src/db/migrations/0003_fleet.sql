-- The end of a host, and what its sandboxes add up to.

alter table hosts
  -- Its credentials are good no more; a new registration clears it.
  add column revoked_at timestamptz(3),
  -- A tombstone: ended sandboxes name the host still, and a host that comes back is told.
  add column deleted_at timestamptz(3),
  -- Its last heartbeat's digest was not the one that our rows have.
  add column digest_differs boolean not null default true,
  -- When all that it has was last held against our rows.
  add column compared_at timestamptz(3);

-- Whoever looks for hosts means those that are there.
drop index hosts_newest;
create index hosts_newest on hosts (created_at desc, id desc) where deleted_at is null;
drop index hosts_by_team;
create index hosts_by_team on hosts (team_id, created_at desc, id desc)
  where team_id is not null and deleted_at is null;
drop index hosts_due;
create index hosts_due on hosts (next_check_at) where status <> 'pending' and deleted_at is null;

-- A sandbox's share of its host's digest: packages/protocol/src/sandbox-digest.ts
-- is the definition, ADR 18 says why. Work under way has none; `missing` has one
-- that no agent can have, so a host with such rows is always looked at.
create function sandbox_digest_term(id text, status text, command_generation bigint) returns bigint
language sql immutable parallel safe
return case when status in ('running', 'paused', 'missing') then
  ('x' || encode(substring(sha256(convert_to(id || ':' || status || ':' || command_generation, 'UTF8'))
    from 1 for 8), 'hex'))::bit(64)::bigint
  else 0 end;

-- Per host, all terms by xor. A table of its own: hosts' rows change with every heartbeat.
create table host_sandbox_digests (
  host_id text primary key references hosts,
  digest bigint not null
) with (fillfactor = 50);

insert into host_sandbox_digests (host_id, digest)
select host_id, bit_xor(sandbox_digest_term(id, status, command_generation))
  from sandboxes where host_id is not null and status not in ('stopped', 'error') group by host_id;

-- In the same statement as the rows, whichever it is: nobody can forget it.
create function keep_host_sandbox_digests() returns trigger language plpgsql as $$
begin
  insert into host_sandbox_digests as known (host_id, digest)
  select host_id, bit_xor(sandbox_digest_term(id, status, command_generation)) from changed
   where host_id is not null group by host_id
  having bit_xor(sandbox_digest_term(id, status, command_generation)) <> 0 order by host_id
  on conflict (host_id) do update set digest = known.digest # excluded.digest;
  return null;
end $$;

create function keep_host_sandbox_digests_of_both() returns trigger language plpgsql as $$
begin
  insert into host_sandbox_digests as known (host_id, digest)
  select host_id, bit_xor(term) from (
    select host_id, sandbox_digest_term(id, status, command_generation) as term from changed_from
    union all
    select host_id, sandbox_digest_term(id, status, command_generation) from changed_to
  ) as terms
   where host_id is not null group by host_id having bit_xor(term) <> 0 order by host_id
  on conflict (host_id) do update set digest = known.digest # excluded.digest;
  return null;
end $$;

create trigger sandboxes_inserted after insert on sandboxes
  referencing new table as changed for each statement execute function keep_host_sandbox_digests();
create trigger sandboxes_deleted after delete on sandboxes
  referencing old table as changed for each statement execute function keep_host_sandbox_digests();
create trigger sandboxes_updated after update on sandboxes
  referencing old table as changed_from new table as changed_to
  for each statement execute function keep_host_sandbox_digests_of_both();
